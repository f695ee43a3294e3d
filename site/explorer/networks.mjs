// Networks behind the radiograph. They are loaded when asked for, by script tags, since a page that is opened as a
// file may fetch nothing, and run in a worker, so that sliders do not wait for them.
import {dice, foundMasks} from "./model.mjs"

const received = globalThis.shipped = {}                                  // what those scripts leave: name → base 64

// The bytes of a shipped file, gzip in base 64.
export async function unpack(name) {
  if (!received[name]) await new Promise((resolve, reject) => {
    const script = document.head.appendChild(document.createElement("script"))
    script.src = `networks/${name}.js`
    script.onload = resolve
    script.onerror = () => reject(new Error(`networks/${name}.js is not beside this page, where make docs puts it`))
  })
  const bytes = Uint8Array.from(atob(received[name]), c => c.charCodeAt(0))
  const stream = new Blob([bytes]).stream().pipeThrough(new DecompressionStream("gzip"))
  return new Uint8Array(await new Response(stream).arrayBuffer())
}

let thread, started
const waiting = []                                                        // answers come in the order of questions

function ask(question, given) {
  return new Promise((resolve, reject) => {
    const id = waiting.push({resolve, reject}) - 1
    thread.postMessage({id, ask: question, ...given})
  })
}

async function start(source) {
  const [runtime, wasm] = await Promise.all([unpack("runtime"), unpack("wasm")])
  thread = new Worker(URL.createObjectURL(new Blob([source], {type: "text/javascript"})))
  thread.onmessage = ({data: {id, answer, error}}) => {
    if (error === undefined) waiting[id].resolve(answer)
    else waiting[id].reject(new Error(error))
    waiting[id] = null
  }
  await ask("start", {runtime, wasm})
}

// Open an ONNX file: {key, channels, size}, the size 0 where any will do. The source is that of the worker.
export async function openNetwork(key, file, source) {
  await (started ??= start(source).catch(error => { started = null; throw error }))
  const found = await ask("open", {key, file}).catch(error => {
    throw new Error(`is not a network that ONNX Runtime can open: ${error.message}`)
  })
  const [, channels, height, width] = found.shape ?? [], stated = side => Number.isInteger(side) ? side : 0
  if (found.inputs !== 1 || found.shape?.length !== 4)
    throw new Error(`takes ${found.inputs} inputs, one of (${found.shape}), allowed is one of (n, channels, h, w)`)
  if (found.type !== "float32") throw new Error(`takes ${found.type}, allowed is float32`)
  if (found.outputs !== 1) throw new Error(`has ${found.outputs} outputs, allowed is one of (n, structures, h, w)`)
  if (![0, 1, 3].includes(stated(channels))) throw new Error(`takes ${channels} channels, allowed are 1 and 3`)
  if (stated(height) !== stated(width)) throw new Error(`takes ${height} × ${width} pixels, allowed are squares`)
  return {key, channels: stated(channels) || 3, size: stated(height)}
}

// Masks of a square radiograph, one for each structure.
export async function segment({key, channels}, grey, size, threshold) {
  const {values, dims} = await ask("run", {key, grey, size, channels})
  if (dims.length !== 4 || dims[2] !== size || dims[3] !== size)
    throw new Error(`returns (${dims.join(", ")}), allowed is (1, structures, ${size}, ${size})`)
  return foundMasks(values, dims[1], threshold)
}

// Do the newest job of those that come while one is done.
export function newest(work) {
  let next = null, busy = false
  return async job => {
    next = job
    if (busy) return
    busy = true
    try { while (next) { const now = next; next = null; await work(now, () => next === null) } }
    finally { busy = false }
  }
}

// Rows of the table below the pictures: what each network found, beside the truth and beside itself without noise.
export function agreement({label, names}, found, without, truth) {
  const known = (masks, name, i) => truth[name] && dice(masks[i], truth[name])
  return names.map((name, i) => ({label, name, truth: known(found, name, i), before: known(without, name, i),
                                  itself: dice(found[i], without[i])}))
}
