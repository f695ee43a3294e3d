// The page: settings in, images, numbers and curves out.
import {aliasTable, channel, cumulated, information, moments, photonsPerPixel} from "./channel.mjs"
import {corrupt, crc32, fieldKey} from "./field.mjs"
import {atSize, edges, maskAtSize} from "./model.mjs"
import {agreement, newest, openNetwork, segment, unpack} from "./networks.mjs"
import {readGreyPng, readRadiograph} from "./read.mjs"

const at = id => document.getElementById(id)
const {presets, pictures, sources, dose, networks, worker} = JSON.parse(at("data").textContent)
const settings = {original: null, image: null, table: null, networks: [], threshold: 0, noisy: null}

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

// Exposure index of a quantum severity, and back: photons per pixel over those of 1 µGy.
const perIndex = () => dose.photons*at("pixel").valueAsNumber**2/100
const indexOf = quantum => photonsPerPixel(quantum)/perIndex()

function showDose() {
  const index = indexOf(at("quantum").valueAsNumber)
  if (!(index > 0)) return
  if (document.activeElement !== at("ei")) at("ei").value = index === Infinity ? "" : short(index)
  if (document.activeElement !== at("dose")) at("dose").value = Math.log10(Math.min(index, 1e6))
  const deviation = 10*Math.log10(index/dose.target)
  at("deviation").textContent = index === Infinity ? "now: no photon noise"
    : `now ${deviation.toFixed(1).replace("-", "−")} dB from the target, ${dose.target}`
}

function setDose(index) {
  const severity = index > 0 ? Math.sqrt(photonsPerPixel(1)/(index*perIndex())) : NaN
  at("quantum").value = Number.isFinite(severity) ? Number(severity.toPrecision(3)) : ""
  at("quantum").oninput()
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

function photonText(severity) {
  const photons = photonsPerPixel(severity.quantum)
  if (photons === Infinity) return "∞"
  return `${Math.round(photons).toLocaleString("en")} (EI ${short(indexOf(severity.quantum))})`
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
    snr: short(table.curve[level].snr), photons: photonText(severity),
    means: `${meanOf(before).toFixed(1)} → ${meanOf(after).toFixed(1)}`,
    crc: crc32(noisy).toString(16).padStart(8, "0"), time: `${(drawn - started).toFixed(0)} ms`, exact: exactText(table),
    python: pythonCall(severity, name, seed, replicate)}
  for (const [id, text] of Object.entries(texts)) at(id).textContent = text
  showDose()
  settings.noisy = noisy
  if (settings.networks.length) look({image, noisy, networks: settings.networks})
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
async function open(file, name = file.name, truth = {}) {
  try {
    const image = await readRadiograph(file)
    takeImage({...image, truth, name})
  } catch (error) { say(error.message, true); return }
  at("name").value = name
  redraw()
}

// Show a radiograph as it is, or as the networks get it.
function takeImage(original) {
  const size = settings.networks[0]?.size
  const image = size ? fitted(original, size) : original
  Object.assign(settings, {original, image})
  show(at("clean"), image.width, image.height, i => image.grey[i])
  at("pixel").value = Number((dose.field/Math.max(image.width, image.height)).toPrecision(4))
}

function fitted(original, size) {
  const {width, height, truth, name} = original
  const masks = Object.entries(truth).map(([structure, mask]) => [structure, maskAtSize(mask, width, height, size)])
  try {
    return {...atSize(original, size), truth: Object.fromEntries(masks),
            note: `shown at ${size} × ${size} pixels, as the network gets it: resized first, then noise`}
  } catch (error) { throw new Error(`${name} ${error.message}`) }
}

const bytesOf = text => Uint8Array.from(atob(text), c => c.charCodeAt(0))

async function openPicture(name) {
  const {png, masks} = pictures.find(picture => picture.name === name)
  const {grey} = await readGreyPng(bytesOf(masks).buffer), truth = {}
  dose.structures.forEach((structure, i) => { truth[structure] = grey.map(bits => bits/85 >> i & 1) })
  return open(new File([bytesOf(png)], `${name}.png`), name, truth)
}

// Networks: choose them, let them look, and show what they found.
function tell(text, error = false) {
  at("networks-status").textContent = text
  at("networks-status").classList.toggle("error", error)
}

async function choose(found, threshold, what) {
  tell(`${what} …`)
  try {
    const opened = await found()
    const before = {networks: settings.networks, threshold: settings.threshold}
    Object.assign(settings, {networks: opened, threshold})
    try { takeImage(settings.original) } catch (error) { Object.assign(settings, before); throw error }
    tell("")
    at("seen").replaceChildren()
    redraw()
    return true
  } catch (error) { tell(error.message, true); return false }
}

let shippedOnes = null
const openOne = async ({key, label, names, size}) =>
  ({...await openNetwork(key, await unpack(key), worker), label, names, size})

function openShipped() {
  shippedOnes ??= Promise.all(networks.map(openOne))
  return shippedOnes.catch(error => { shippedOnes = null; throw error })
}

async function openOwn() {
  const [file] = at("onnx").files, names = at("structures").value.split(",").map(name => name.trim()).filter(Boolean)
  try {
    if (!names.length) throw new Error("needs the names of its structures, such as: lungs, heart")
    const found = await openNetwork(`own ${file.name}`, new Uint8Array(await file.arrayBuffer()), worker)
    return [{...found, label: file.name, names, size: found.size || +at("size").value}]
  } catch (error) { throw new Error(`${file.name} ${error.message}`) }
}

async function leave() {
  Object.assign(settings, {networks: []})
  at("seen").replaceChildren()
  at("dice").replaceChildren()
  tell("")
  takeImage(settings.original)
  redraw()
}

function chooseNetworks() {
  const chosen = at("networks").value
  if (chosen === "shipped") return choose(openShipped, 0, "Loading two networks and their runtime")
  if (chosen === "own") return choose(openOwn, +at("outputs").value, "Opening your network")
  return leave()
}

function takeOnnx() {
  if (!at("onnx").files.length) return
  if (!at("networks").querySelector("[value=own]")) at("networks").append(new Option("your own", "own"))
  at("networks").value = "own"
  chooseNetworks()
}

async function masksOf(network, grey, size) {
  const found = await segment(network, grey, size, settings.threshold)
  if (found.length !== network.names.length)
    throw new Error(`${network.label} returns ${found.length} structures, named are ${network.names.join(", ")}`)
  return found
}

const look = newest(async ({image, noisy, networks: chosen}, isNewest) => {
  const started = performance.now(), seen = []
  try {
    for (const network of chosen) {
      const without = (image.found ??= {})[network.key] ??= await masksOf(network, image.grey, image.width)
      seen.push({network, without, found: await masksOf(network, noisy, image.width)})
    }
  } catch (error) { tell(error.message, true); return }
  if (image !== settings.image || chosen !== settings.networks) return
  const rows = seen.flatMap(({network, found, without}) => agreement(network, found, without, image.truth))
  seen.forEach(({network, found}, i) => showSeen(i, network, found, noisy, image, rows))
  showAgreement(rows)
  at("seen").masks = seen.map(({found}) => found)                          // for who wants to check them
  const ms = (performance.now() - started).toFixed(0)
  if (isNewest()) tell(`${chosen.length > 1 ? "Both looked" : "Looked"} in ${ms} ms.`)
})

const COLOURS = ["#56b4e9", "#ffb000", "#cc79a7", "#7bd389"]              // told apart by stroke and name as well
const STROKES = ["solid", "dashed", "dotted", "dashed"]

function showSeen(i, network, found, noisy, image, rows) {
  const figure = at("seen").children[i] ?? addSeen(network), canvas = figure.querySelector("canvas")
  const small = new OffscreenCanvas(image.width, image.width), context = canvas.getContext("2d")
  show(small, image.width, image.width, j => noisy[j])
  context.imageSmoothingEnabled = false
  context.drawImage(small, 0, 0, canvas.width, canvas.height)
  for (const name of network.names) if (image.truth[name]) {
    outline(context, image.truth[name], image.width, "#000", 4)            // dark below, to stand out on any grey
    outline(context, image.truth[name], image.width, "#fff", 1.5)
  }
  found.forEach((mask, j) => {
    outline(context, mask, image.width, "#000", 6)
    outline(context, mask, image.width, COLOURS[j % 4], 4, STROKES[j % 4] === "solid" ? 1 : .55)
  })
  const words = rows.filter(({label}) => label === network.label)
    .map(({name, truth, itself}) => `${name}: Dice ${(truth ?? itself).toFixed(2)}`)
  canvas.setAttribute("aria-label", `Contours by the network ${network.label}. ${words.join(", ")}`)
}

function addSeen({label, names}) {
  const figure = at("seen").appendChild(document.createElement("figure"))
  figure.innerHTML = `<figcaption></figcaption><canvas width="512" height="512" role="img"></canvas><small></small>`
  const [caption, , small] = figure.children
  caption.textContent = label[0].toUpperCase() + label.slice(1)
  const strokes = names.map((name, i) => [name, STROKES[i % 4], COLOURS[i % 4]])
  if (names.some(name => settings.image.truth[name])) strokes.push(["truth", "thin", "#999"])
  for (const [name, stroke, colour] of strokes) {
    const key = small.appendChild(document.createElement("span"))
    key.className = `key ${stroke}`
    key.style.borderColor = colour
    small.append(`${name} `)
  }
  return figure
}

// The edges of a mask; a share of each edge below 1 makes it look dashed.
function outline(context, mask, size, colour, width, share = 1) {
  const scale = context.canvas.width/size
  context.strokeStyle = colour
  context.lineWidth = width
  context.beginPath()
  for (const [x, y, right, below] of edges(mask, size)) {
    context.moveTo(x*scale, y*scale)
    context.lineTo((x + (right - x)*share)*scale, (y + (below - y)*share)*scale)
  }
  context.stroke()
}

function showAgreement(rows) {
  const number = value => value === undefined ? "not known" : value.toFixed(3)
  const table = document.createElement("table"), head = table.createTHead().insertRow()
  const titles = ["Network", "Structure", "Dice with the truth", "… without noise", "Dice with itself without noise"]
  for (const title of titles) {
    const cell = head.appendChild(document.createElement("th"))
    cell.scope = "col"
    cell.textContent = title
  }
  const body = table.createTBody()
  for (const {label, name, truth, before, itself} of rows) {
    const row = body.insertRow()
    for (const text of [label, name, number(truth), number(before), number(itself)]) row.insertCell().textContent = text
  }
  at("dice").replaceChildren(table)
}

function listen() {
  at("preset").onchange = () => {
    const preset = presets.find(({name}) => name === at("preset").value)
    if (preset) { setSeverity(preset.severity); redraw() }
  }
  at("picture").onchange = () => openPicture(at("picture").value)
  at("file").onchange = () => at("file").files.length && open(at("file").files[0])
  for (const id of ["name", "seed", "replicate", "pixel"]) at(id).oninput = redraw
  at("dose").oninput = () => setDose(10**at("dose").valueAsNumber)
  at("ei").oninput = () => setDose(at("ei").valueAsNumber)
  at("networks").onchange = chooseNetworks
  at("onnx").onchange = takeOnnx
  for (const id of ["outputs", "structures", "size"]) at(id).onchange = takeOnnx
  document.body.ondragover = event => { event.preventDefault(); document.body.classList.add("dropping") }
  document.body.ondragleave = () => document.body.classList.remove("dropping")
  document.body.ondrop = event => {
    event.preventDefault()
    document.body.classList.remove("dropping")
    const [file] = event.dataTransfer.files
    if (file?.name.endsWith(".onnx") && networks.length) { at("onnx").files = event.dataTransfer.files; takeOnnx() }
    else if (file) open(file)
  }
  matchMedia("(prefers-color-scheme: dark)").onchange = redraw
}

function addNetworks() {
  at("choices").hidden = !networks.length
  at("networks-about").textContent = networks.length
    ? "Two networks of one architecture, trained on the same real radiographs, one without noise, one on the paper's "
      + "ladder. They get the radiograph at their own size, so choosing them brings it there."
    : "The live networks are left out of this copy: it was made without npm, which fetches their runtime."
  const choices = [["none", ""], ["lungs and heart, trained in two ways", "shipped"]]
  for (const [text, value] of choices) at("networks").append(new Option(text, value))
}

// Begin with what the address says after #, such as #quantum=4&electronic=2&seed=1&name=a, or with a condition.
async function begin() {
  const groups = [...new Set(presets.map(({group}) => group))]
  const inGroup = group => presets.filter(preset => preset.group === group).map(({label, name}) => [label, name])
  addOptions(at("preset"), groups.map(group => [group, inGroup(group)]))
  at("preset").prepend(new Option("own setting", ""))
  addOptions(at("picture"), [["Computed phantoms", pictures.map(({name, label}) => [label, name])]])
  sources.forEach(addSlider)
  addNetworks()
  at("field").open = matchMedia("(min-width: 70rem)").matches
  listen()
  const asked = new URLSearchParams(location.hash.slice(1)), given = sources.filter(({name}) => asked.has(name))
  const first = presets.find(({name}) => name === "4,0")
  const severity = given.length ? Object.fromEntries(given.map(({name}) => [name, +asked.get(name)])) : first.severity
  at("preset").value = presets.find(preset => written(preset.severity) === written(severity))?.name ?? ""
  setSeverity(severity)
  at("seed").value = asked.get("seed") ?? 0
  at("replicate").value = asked.get("replicate") ?? 0
  await openPicture(asked.get("picture") ?? pictures[0].name)
  if (asked.has("name")) { at("name").value = asked.get("name"); redraw() }
  if (asked.has("networks") && networks.length) { at("networks").value = "shipped"; await chooseNetworks() }
  document.body.dataset.ready = "yes"
}

begin()
