// Answers questions about the explorer's modules: a JSON list of {ask, …} on standard input, a list of answers out.
import {aliasTable, channel, cumulated, information, moments} from "../site/explorer/channel.mjs"
import {blake2b128, corrupt, crc32, fieldKey, fieldName, philox, pythonFloat} from "../site/explorer/field.mjs"
import {atSize, dice, edges, maskAtSize} from "../site/explorer/model.mjs"
import {readDicom, readGreyPng} from "../site/explorer/read.mjs"
import {readFileSync} from "node:fs"

const bytes = base64 => new Uint8Array(Buffer.from(base64, "base64"))
const base64 = array => Buffer.from(array).toString("base64")
const table = ({severity}) => aliasTable(cumulated(channel(severity)))

const answers = {
  noisy: ({severity, name, seed, replicate, clean}) =>
    base64(corrupt(bytes(clean), table({severity}), fieldKey(severity, name, seed, replicate))),
  table: question => crc32(table(question)),
  units: ({severity}) => [...cumulated(channel(severity))],
  snr: ({severity}) => moments(channel(severity)).map(({snr}) => snr),
  information: ({severity, histogram}) => information(channel(severity), histogram),
  name: ({severity, name}) => fieldName(severity, name),
  blake2b: ({text}) => [...blake2b128(bytes(text), "8-bit")],
  philox: ({counter, key}) => { const out = new Uint32Array(4); philox(counter, key, out); return [...out] },
  resized: ({grey, width, height, size}) => base64(atSize({grey: bytes(grey), width, height}, size).grey),
  mask: ({mask, width, height, size}) => base64(maskAtSize(bytes(mask), width, height, size)),
  dice: ({one, other}) => dice(bytes(one), bytes(other)),
  edges: ({mask, size}) => edges(bytes(mask), size).length,
  float: ({x}) => pythonFloat(x),
  read: async ({path}) => {
    const {buffer, byteOffset, length} = readFileSync(path), file = buffer.slice(byteOffset, byteOffset + length)
    try {
      const {width, height, grey} = await (path.endsWith(".png") ? readGreyPng(file) : readDicom(file))
      return {width, height, grey: base64(grey)}
    } catch (error) { return {error: error.message} }
  },
}

const questions = JSON.parse(readFileSync(0)), found = []
for (const question of questions) found.push(await answers[question.ask](question))
process.stdout.write(JSON.stringify(found, (_, x) => x === Infinity ? "∞" : x))
