// The page: settings in, images, numbers and curves out.
import {aliasTable, channel, cumulated, information, moments, photonsPerPixel} from "./channel.mjs"
import {corrupt, crc32, fieldKey} from "./field.mjs"
import {readRadiograph} from "./read.mjs"

const at = id => document.getElementById(id)
const {presets, pictures, sources} = JSON.parse(at("data").textContent)
const settings = {severity: {}, image: null, table: null}

// Build the controls from what the package knows.
function addOptions(select, groups) {
  for (const [label, names] of groups) {
    const group = select.appendChild(document.createElement("optgroup"))
    group.label = label
    for (const [text, value] of names) group.append(new Option(text, value))
  }
}

function addSlider({name, label, unit, most}) {
  const row = at("sliders").appendChild(document.createElement("div"))
  row.className = "slider"
  row.innerHTML = `<span></span><input type="range" min="0" max="100" step="0.5">
                   <input type="number" min="0" step="any"><span class="unit"></span>`
  const [title, range, number, small] = row.children
  title.textContent = label
  small.textContent = unit
  range.setAttribute("aria-label", `${label}, slider`)
  number.setAttribute("aria-label", label)
  number.id = name
  number.max = most
  const severityAt = place => Number((most*(place/100)**2).toPrecision(2)) // finer where noise begins
  range.oninput = () => { number.value = severityAt(+range.value); at("preset").value = ""; redraw() }
  number.oninput = () => { range.value = 100*Math.sqrt(number.value/most); at("preset").value = ""; redraw() }
}

function setSeverity(severity) {
  for (const {name, most} of sources) {
    at(name).value = severity[name] ?? 0
    at(name).previousElementSibling.value = 100*Math.sqrt((severity[name] ?? 0)/most)
  }
}

// Read the controls, or say what is wrong.
function readSeverity() {
  const severity = {}
  for (const {name, label, most} of sources) {
    const value = at(name).valueAsNumber
    if (!(value >= 0 && value <= most))
      throw new Error(`${label} must lie between 0 and ${most}, got ${at(name).value || "nothing"}`)
    if (value) severity[name] = value
  }
  return severity
}

function readInteger(id) {
  const value = at(id).valueAsNumber
  if (!Number.isSafeInteger(value)) throw new Error(`${id} must be an integer, got ${at(id).value || "nothing"}`)
  return value
}

const written = severity => Object.entries(severity).sort().map(([name, s]) => `${name}=${s}`).join(", ")

// The table of a condition, and whether it is known to be Python's.
function tableOf(severity) {
  const condition = written(severity)
  if (settings.table?.condition === condition) return settings.table
  const pmf = channel(severity), alias = aliasTable(cumulated(pmf))
  const known = presets.find(preset => written(preset.severity) === condition)
  const exact = !known || known.crc === crc32(alias)
  return settings.table = {condition, pmf, alias, curve: moments(pmf), known, exact}
}

// Draw.
function show(canvas, width, height, value) {
  if (canvas.width !== width || canvas.height !== height) { canvas.width = width; canvas.height = height }
  const context = canvas.getContext("2d"), data = context.createImageData(width, height)
  const pixels = new Uint32Array(data.data.buffer)
  for (let i = 0; i < pixels.length; i++) pixels[i] = 0xFF000000 | value(i)*0x010101
  context.putImageData(data, 0, 0)
}

function histogramOf(grey) {
  const counts = new Array(256).fill(0)
  for (const level of grey) counts[level]++
  return counts
}

function chart(canvas) {
  const {color, fill, stroke} = getComputedStyle(canvas)                  // of the light or the dark page
  const context = canvas.getContext("2d"), {width, height} = canvas
  context.clearRect(0, 0, width, height)
  context.font = "14px system-ui, sans-serif"
  context.lineWidth = 2
  context.fillStyle = color
  for (const level of [0, 64, 128, 192, 255])
    context.fillText(level, Math.min(width - 26, 4 + level/255*(width - 8)), height - 4)
  return {context, fill, stroke, x: level => 4 + level/255*(width - 8), y: share => height - 22 - share*(height - 44)}
}

function drawHistogram(clean, noisy) {
  const {context, fill, stroke, x, y} = chart(at("histogram"))
  const highest = Math.max(...clean.slice(1, 255), ...noisy.slice(1, 255)), share = n => Math.min(1, n/highest)
  context.fillStyle = fill
  clean.forEach((n, level) => context.fillRect(x(level) - 1, y(share(n)), 2, y(0) - y(share(n))))
  context.strokeStyle = stroke
  context.beginPath()
  noisy.forEach((n, level) => context.lineTo(x(level), y(share(n))))
  context.stroke()
}

function drawCurve(curve, level) {
  const {context, stroke, x, y} = chart(at("curve")), finite = curve.map(({snr}) => snr).filter(Number.isFinite)
  if (finite.length < 200) { context.fillText("no noise: SNR is infinite", 12, 24); return }
  const highest = Math.max(...finite)
  context.fillText(`${highest.toPrecision(3)}`, 8, 16)
  context.strokeStyle = context.fillStyle = stroke
  context.beginPath()
  curve.forEach(({snr}, g) => Number.isFinite(snr) && context.lineTo(x(g), y(snr/highest)))
  context.stroke()
  context.beginPath()
  context.arc(x(level), y(Math.min(1, curve[level].snr/highest)), 6, 0, 7)
  context.fill()
}

const meanOf = histogram => histogram.reduce((sum, n, level) => sum + n*level, 0)/histogram.reduce((sum, n) => sum + n)
const short = value => Number.isFinite(value) ? String(Number(value.toPrecision(3))) : "∞"

function photonText(severity, {width, height}) {
  const photons = photonsPerPixel(severity.quantum), pixel = 430/Math.max(width, height)
  if (photons === Infinity) return "∞"
  const index = 100*photons/30174/pixel**2
  return `${Math.round(photons).toLocaleString("en")} (EI ${short(index)})`
}

function exactText({known, exact}) {
  if (!known) return "Not a listed condition: each probability equals Python's to 2⁻³², a rare pixel may differ."
  return exact ? "Bit for bit Python's: the table's checksum is that of the package."
    : "This browser's arithmetic gives another table than Python's: single pixels may differ."
}

function pythonCall(severity, name, seed, replicate) {
  return `corrupt(image, Severity(${written(severity)}), ${JSON.stringify(name)}, seed=${seed}, replicate=${replicate})`
}

function draw() {
  const {image} = settings, severity = readSeverity(), started = performance.now()
  const name = at("name").value, seed = readInteger("seed"), replicate = readInteger("replicate")
  const table = tableOf(severity), key = fieldKey(severity, name, seed, replicate)
  const noisy = Object.keys(severity).length ? corrupt(image.grey, table.alias, key) : image.grey
  show(at("noisy"), image.width, image.height, i => noisy[i])
  const drawn = performance.now()
  show(at("difference"), image.width, image.height, i => Math.max(0, Math.min(255, 128 + noisy[i] - image.grey[i])))
  const before = histogramOf(image.grey), after = histogramOf(noisy), level = Math.round(meanOf(before))
  drawHistogram(before, after)
  drawCurve(table.curve, level)
  const texts = {bits: `${information(table.pmf, before).toFixed(2)} of ${information(identity, before).toFixed(2)}`,
    snr: short(table.curve[level].snr), photons: photonText(severity, image),
    means: `${meanOf(before).toFixed(1)} → ${meanOf(after).toFixed(1)}`, crc: crc32(noisy).toString(16).padStart(8, "0"),
    time: `${(drawn - started).toFixed(0)} ms`, exact: exactText(table),
    python: pythonCall(severity, name, seed, replicate)}
  for (const [id, text] of Object.entries(texts)) at(id).textContent = text
}

const identity = channel({})

function say(text, error = false) {
  at("status").textContent = text
  at("status").classList.toggle("error", error)
}

function redraw() {
  try { draw(); say(settings.image.note) }
  catch (error) { say(error.message, true) }
}

// Take a radiograph from a file.
async function open(file, name = file.name) {
  try { settings.image = await readRadiograph(file) }
  catch (error) { say(error.message, true); return }
  const {width, height, grey} = settings.image
  show(at("clean"), width, height, i => grey[i])
  at("name").value = name
  redraw()
}

function openPicture(name) {
  const {png} = pictures.find(picture => picture.name === name)
  const bytes = Uint8Array.from(atob(png), c => c.charCodeAt(0))
  return open(new File([bytes], `${name}.png`), name)
}

function listen() {
  at("preset").onchange = () => {
    const preset = presets.find(({name}) => name === at("preset").value)
    if (preset) { setSeverity(preset.severity); redraw() }
  }
  at("picture").onchange = () => openPicture(at("picture").value)
  at("file").onchange = () => at("file").files.length && open(at("file").files[0])
  for (const id of ["name", "seed", "replicate"]) at(id).oninput = redraw
  document.body.ondragover = event => { event.preventDefault(); document.body.classList.add("dropping") }
  document.body.ondragleave = () => document.body.classList.remove("dropping")
  document.body.ondrop = event => {
    event.preventDefault()
    document.body.classList.remove("dropping")
    if (event.dataTransfer.files.length) open(event.dataTransfer.files[0])
  }
  matchMedia("(prefers-color-scheme: dark)").onchange = redraw
}

// Begin with what the address says after #, such as #quantum=4&electronic=2&seed=1&name=a, or with a condition.
async function begin() {
  const groups = [...new Set(presets.map(({group}) => group))]
  const inGroup = group => presets.filter(preset => preset.group === group).map(({label, name}) => [label, name])
  addOptions(at("preset"), groups.map(group => [group, inGroup(group)]))
  at("preset").prepend(new Option("own setting", ""))
  addOptions(at("picture"), [["Computed phantoms", pictures.map(({name, label}) => [label, name])]])
  sources.forEach(addSlider)
  at("field").open = matchMedia("(min-width: 70rem)").matches
  listen()
  const asked = new URLSearchParams(location.hash.slice(1)), given = sources.filter(({name}) => asked.has(name))
  const first = presets.find(({name}) => name === "4,0")
  at("preset").value = given.length ? "" : first.name
  setSeverity(given.length ? Object.fromEntries(given.map(({name}) => [name, asked.get(name)])) : first.severity)
  at("seed").value = asked.get("seed") ?? 0
  at("replicate").value = asked.get("replicate") ?? 0
  await openPicture(asked.get("picture") ?? pictures[0].name)
  if (asked.has("name")) { at("name").value = asked.get("name"); redraw() }
  document.body.dataset.ready = "yes"
}

begin()
