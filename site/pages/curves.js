// Curves with intervals and the table behind them, of whatever `shown` holds: {conditions, metrics, filters, curves}.
// conditions: text → {label, strengths}; metrics: name → {label, higher}; a curve has the keys that filters name,
// output, metric, images, patients, interval, and points: condition → [value, low, high, floor].
(() => {
  const place = document.getElementById("curves"), {conditions, metrics, filters, curves, start} = shown, most = 8
  const COLOURS = ["#0072b2", "#d55e00", "#009e73", "#cc79a7", "#7a5195", "#b8860b", "#56b4e9", "#8c564b"]
  const DASHES = ["", "8 4", "2 4", "10 3 2 3"], SHAPES = ["circle", "square", "triangle", "diamond"]
  const state = {output: "", metric: "", noise: "", at: null, ...start}
  const element = (parent, name, text = "", attributes = {}) => {
    const made = parent.appendChild(document.createElement(name))
    made.textContent = text
    for (const [key, value] of Object.entries(attributes)) made.setAttribute(key, value)
    return made
  }
  const drawn = (parent, name, attributes, text = "") => {
    const made = parent.appendChild(document.createElementNS("http://www.w3.org/2000/svg", name))
    for (const [key, value] of Object.entries(attributes)) made.setAttribute(key, value)
    made.textContent = text
    return made
  }
  const unique = values => [...new Set(values)]
  const number = value => value === null || value === undefined ? "undefined" : value.toFixed(3)
  const written = ([value, low, high]) =>
    number(value) + (low === null ? "" : ` [${low.toFixed(3)}, ${high.toFixed(3)}]`)

  // What is asked for.
  const matches = (curve, besides) =>
    filters.every(({key}) => key === besides || !state[key] || curve[key] === state[key])
  const isShown = ({output, metric}) => output === state.output && metric === state.metric
  const named = () => curves.filter(curve => matches(curve) && isShown(curve))
  const strength = condition => {                                          // along the axis; null beside it
    const [first, ...more] = Object.entries(conditions[condition].strengths)
    return !first ? 0 : first[0] === state.noise && !more.length ? first[1] : null
  }
  const pointsOf = curve => Object.entries(curve.points)
    .map(([condition, point]) => ({condition, x: strength(condition), point}))
    .filter(({x, point}) => x !== null && point[0] !== null).sort((a, b) => a.x - b.x)
  const labelOf = curve => {
    const told = filters.filter(({key}) => unique(named().map(other => other[key])).length > 1)
    const words = told.map(({key, label}) => (/^\d+$/.test(curve[key]) ? `${label.toLowerCase()} ` : "") + curve[key])
    return words.filter(Boolean).join(", ") || filters.map(({key}) => curve[key]).filter(Boolean)[0]
  }

  // Controls: one choice each; what no curve has is not offered.
  const form = element(place, "form", "", {class: "curves-filters", "aria-label": "Which curves"})
  form.onsubmit = event => event.preventDefault()
  const chooser = (key, label) => {
    const select = element(element(form, "label", `${label} `), "select", "", {id: `curves-${key}`})
    select.onchange = () => { state[key] = select.value; refresh() }
    return {key, select}
  }
  const choosers = [...filters.map(({key, label}) => chooser(key, label)), chooser("output", "Output"),
                    chooser("metric", "Metric"), chooser("noise", "Noise along the axis")]

  function optionsOf(key) {
    const left = curves.filter(curve => matches(curve, key))
    const all = key === "noise" ? left.filter(isShown).flatMap(({points}) => Object.keys(points).flatMap(name => {
      const sources = Object.keys(conditions[name].strengths)
      return sources.length === 1 ? sources : []
    })) : left.map(curve => curve[key])
    const values = unique(all).filter(value => value !== "").sort((a, b) => a.localeCompare(b, "en", {numeric: true}))
    return ["output", "metric", "noise"].includes(key) ? values : ["", ...values]
  }

  function offer({key, select}) {
    const values = optionsOf(key), label = value => key === "metric" ? metrics[value].label : value || "all"
    if (!values.includes(state[key])) state[key] = values.includes(preferred[key]) ? preferred[key] : values[0] ?? ""
    select.replaceChildren(...values.map(value => new Option(label(value), value)))
    select.value = state[key]
    select.parentElement.hidden = values.length < 2
  }
  const preferred = {output: "lungs", metric: "dice", noise: "quantum"}

  // The picture.
  const figure = element(place, "figure", "", {class: "curves-figure"})
  const svg = drawn(figure, "svg", {tabindex: 0, role: "img"})
  const readout = element(figure, "p", "", {role: "status", class: "curves-readout"})
  const legend = element(figure, "ul", "", {class: "curves-legend"}), note = element(figure, "figcaption", "")
  let marks = []

  function marker(parent, shape, x, y, colour) {
    const d = {circle: `M${x - 4},${y}a4,4 0 1 0 8,0a4,4 0 1 0 -8,0`, square: `M${x - 4},${y - 4}h8v8h-8z`,
               triangle: `M${x},${y - 5}l5,9h-10z`, diamond: `M${x},${y - 5}l5,5l-5,5l-5,-5z`}[shape]
    return drawn(parent, "path", {d, fill: colour})
  }

  function scales(lines) {
    const points = lines.flatMap(({points}) => points)
    const values = points.flatMap(({point}) => point.slice(0, 3).filter(value => value !== null))
    const width = figure.clientWidth, height = Math.max(260, Math.min(420, width*.6)), left = 48, bottom = 44
    let low = Math.min(...values), high = Math.max(...values)
    if (low >= 0 && high <= 1) { low = 0; high = 1 }
    if (low === high) high = low + 1
    const right = Math.max(...points.map(({x}) => x)) || 1
    return {width, height, left, bottom, low, high, right, x: v => left + 12 + v/right*(width - left - 38),
            y: v => 10 + (high - v)/(high - low)*(height - bottom - 10)}
  }

  function ticks(low, high) {                                              // round numbers, about five
    const size = 10**Math.floor(Math.log10((high - low)/4))
    const step = [1, 2, 5, 10].map(k => k*size).find(wide => (high - low)/wide <= 6)
    return Array.from({length: 7}, (_, i) => (Math.ceil(low/step) + i)*step).filter(t => t <= high*(1 + 1e-9))
  }

  function axes({width, height, left, bottom, low, high, right, x, y}) {
    for (const value of ticks(low, high)) {
      drawn(svg, "line", {x1: left, x2: width - 14, y1: y(value), y2: y(value), class: "grid"})
      drawn(svg, "text", {x: left - 6, y: y(value) + 5, "text-anchor": "end"}, Number(value.toPrecision(3)))
    }
    for (const value of ticks(0, right))
      drawn(svg, "text", {x: x(value), y: height - bottom + 18, "text-anchor": "middle"}, Number(value.toPrecision(2)))
    drawn(svg, "text", {x: (left + width)/2, y: height - 6, "text-anchor": "middle"}, `${state.noise} severity`)
  }

  function line({curve, points}, k, n, {x, y}) {
    const colour = COLOURS[k], where = ({x: across}) => x(across) + 3*(k - (n - 1)/2)  // beside each other
    const bar = at => ({x1: where(at), x2: where(at), y1: y(at.point[1]), y2: y(at.point[2]), stroke: colour})
    for (const at of points) if (at.point[1] !== null) drawn(svg, "line", {...bar(at), "stroke-width": 1.5})
    const d = points.map((at, i) => `${i ? "L" : "M"}${where(at)},${y(at.point[0])}`).join("")
    drawn(svg, "path", {d, fill: "none", stroke: colour, "stroke-width": 2, "stroke-dasharray": DASHES[k % 4]})
    for (const at of points) {
      const mark = marker(svg, SHAPES[k % 4], where(at), y(at.point[0]), colour)
      marks.push({mark, px: where(at), py: y(at.point[0]), curve, ...at})
    }
  }

  function draw() {
    const all = named().map(curve => ({curve, points: pointsOf(curve)})).filter(({points}) => points.length > 1)
    const lines = all.slice(0, most)
    svg.replaceChildren()
    legend.replaceChildren()
    marks = []
    readout.textContent = ""
    note.textContent = lines.length ? caption(all) : "No curve has two conditions along this axis."
    if (!lines.length) { svg.setAttribute("height", 0); return }
    const scale = scales(lines)
    svg.setAttribute("viewBox", `0 0 ${scale.width} ${scale.height}`)
    svg.setAttribute("height", scale.height)
    svg.setAttribute("aria-label", `${metrics[state.metric].label} of ${state.output} by ${state.noise} severity, `
      + `${lines.length} curves; arrow keys read the points, the table below has them all`)
    axes(scale)
    lines.forEach((one, k) => {
      line(one, k, lines.length, scale)
      const item = element(legend, "li", ""), key = drawn(item, "svg", {width: 38, height: 12, "aria-hidden": "true"})
      const across = {x1: 0, x2: 38, y1: 6, y2: 6, "stroke-width": 2, "stroke-dasharray": DASHES[k % 4]}
      drawn(key, "line", {...across, stroke: COLOURS[k]})
      marker(key, SHAPES[k % 4], 19, 6, COLOURS[k])
      element(item, "span", labelOf(one.curve))
    })
  }

  function caption(all) {
    const kinds = unique(all.map(({curve}) => curve.interval)).join("; "), {label, higher} = metrics[state.metric]
    const left = all.length > most ? ` The first ${most} of ${all.length} curves are drawn; the table has all.` : ""
    const n = unique(all.map(({curve}) => curve.patients))
    return `${label} of ${state.output}, ${higher ? "higher" : "lower"} is better. Bars: 95 % intervals over patients `
      + `(${kinds}); n = ${n.join(", ")} patients.${left}`
  }

  function read(mark) {
    marks.forEach(other => other.mark.classList.toggle("read", other === mark))
    state.at = mark
    const {curve, condition, point} = mark
    readout.textContent = `${labelOf(curve)} · ${conditions[condition].label}: ${written(point)}, `
      + `n = ${curve.images} images of ${curve.patients} patients`
      + (point[3] === null ? "" : `, trivial predictor ${number(point[3])}`)
  }

  svg.addEventListener("pointermove", event => {
    const {left, top} = svg.getBoundingClientRect()
    const far = ({px, py}) => Math.hypot(px - event.clientX + left, py - event.clientY + top)
    const nearest = marks.reduce((best, mark) => !best || far(mark) < far(best) ? mark : best, null)
    if (nearest && far(nearest) < 40) read(nearest)
  })
  svg.addEventListener("keydown", event => {
    const step = {ArrowRight: 1, ArrowDown: 1, ArrowLeft: -1, ArrowUp: -1}[event.key]
    if (!step || !marks.length) return
    event.preventDefault()
    read(marks[(marks.indexOf(state.at) + step + marks.length) % marks.length])
  })

  // The table: a row for each curve, a column for each condition.
  const scrolled = element(place, "div", "", {class: "output", tabindex: 0, role: "region", "aria-label": "All values"})
  function table() {
    const rows = named(), columns = Object.keys(conditions).filter(name => rows.some(({points}) => points[name]))
    const made = document.createElement("table"), head = made.createTHead().insertRow()
    const words = filters.filter(({key}) => rows.some(curve => curve[key]))
    for (const {label} of words) element(head, "th", label, {scope: "col", class: "word"})
    const titles = ["Patients", ...columns.map(name => conditions[name].label)]
    for (const title of titles) element(head, "th", title, {scope: "col"})
    const body = made.createTBody()
    for (const curve of rows) {
      const row = body.insertRow()
      for (const {key} of words) element(row, "td", curve[key], {class: "word"})
      element(row, "td", curve.patients)
      for (const name of columns) element(row, "td", curve.points[name] ? written(curve.points[name]) : "")
    }
    scrolled.replaceChildren(made)
  }

  // All values of the chosen curves, in long form.
  function csv() {
    const quote = value => /[",\n]/.test(value ?? "") ? `"${String(value).replaceAll('"', '""')}"` : value ?? ""
    const names = [...filters.map(({key}) => key), "output", "metric", "condition", "value", "low", "high", "floor",
                   "images", "patients", "interval"]
    const rows = curve => Object.entries(curve.points).map(([condition, [value, low, high, floor]]) =>
      ({...curve, condition, value, low, high, floor}))
    const lines = curves.filter(curve => matches(curve)).flatMap(rows)
      .map(row => names.map(name => quote(row[name])).join(","))
    return [names.join(","), ...lines].join("\n") + "\n"
  }

  const button = element(place, "button", "Download as CSV, with all outputs and metrics", {type: "button"})
  button.className = "unfold"
  button.onclick = () => {
    const link = document.createElement("a")
    link.href = URL.createObjectURL(new Blob([csv()], {type: "text/csv"}))
    link.download = `${place.dataset.name}.csv`
    link.click()
  }
  place.csv = csv

  function refresh() { choosers.forEach(offer); draw(); table() }
  addEventListener("resize", draw)
  refresh()
})()
