// Runs networks beside the page, so that it can be used meanwhile: a question in, an answer or a reason out.
let ort
const sessions = new Map(), reason = error => String(error?.message ?? error).split("\n")[0]

const answers = {
  async start({runtime, wasm}) {
    ort = await import(URL.createObjectURL(new Blob([runtime], {type: "text/javascript"})))
    ort.env.wasm.numThreads = 1
    ort.env.wasm.wasmBinary = wasm
    ort.env.logLevel = "error"
  },
  async open({key, file}) {
    const session = await ort.InferenceSession.create(file, {executionProviders: ["wasm"], logSeverityLevel: 4})
    const [input, ...more] = session.inputMetadata
    await sessions.get(key)?.release()
    sessions.set(key, session)
    return {shape: input.shape, type: input.type, inputs: 1 + more.length, outputs: session.outputNames.length}
  },
  async run({key, grey, size, channels}) {
    const session = sessions.get(key), one = Float32Array.from(grey, level => level/255)
    const values = new Float32Array(channels*one.length)
    for (let c = 0; c < channels; c++) values.set(one, c*one.length)
    const tensor = new ort.Tensor("float32", values, [1, channels, size, size])
    const found = (await session.run({[session.inputNames[0]]: tensor}))[session.outputNames[0]]
    return {values: Float32Array.from(found.data, Number), dims: [...found.dims]}
  },
}

onmessage = async ({data: {id, ask, ...given}}) => {
  try { postMessage({id, answer: await answers[ask](given)}) }
  catch (error) { postMessage({id, error: reason(error)}) }
}
