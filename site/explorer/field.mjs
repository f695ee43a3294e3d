// Noise fields that belong to their image: the key of nbs/00b_channel, Philox4x32-10, and one look-up a pixel.

// A number as Python's repr writes a float.
export function pythonFloat(x) {
  const [digits, exponent] = x.toExponential().split("e")
  if (x && (exponent < -4 || exponent >= 16)) return `${digits}e${exponent[0]}${exponent.slice(1).padStart(2, "0")}`
  return Number.isInteger(x) ? x.toFixed(1) : String(x)
}

// A text as Python's json.dumps writes it, in ASCII.
export const pythonText = text =>
  JSON.stringify(text).replace(/[^ -~]/g, c => "\\u" + c.charCodeAt(0).toString(16).padStart(4, "0"))

// What names a field: seed and replicate are integers, the name a text or an integer, severities by source.
export function fieldName(severity, name, seed = 0, replicate = 0) {
  const acting = Object.entries(severity).filter(([, s]) => s).sort()
  const pair = acting.every(([source]) => source === "quantum" || source === "electronic")
  const written = pair ? [severity.quantum ?? 0, severity.electronic ?? 0].map(pythonFloat).join(", ")
    : `{${acting.map(([source, s]) => `"${source}": ${pythonFloat(s)}`).join(", ")}}`
  return `[${seed}, ${typeof name === "string" ? pythonText(name) : name}, ${written}, ${replicate}]`
}

const IV = [0x6a09e667f3bcc908n, 0xbb67ae8584caa73bn, 0x3c6ef372fe94f82bn, 0xa54ff53a5f1d36f1n,
            0x510e527fade682d1n, 0x9b05688c2b3e6c1fn, 0x1f83d9abfb41bd6bn, 0x5be0cd19137e2179n]
const ORDERS = ["0123456789abcdef", "ea489fd61c02b753", "b8c052fdae367194", "7931dcbe265a40f8", "905724afe1bc683d",
                "2c6a0b834d75fe19", "c51fed4a0763928b", "db7ec13950f4862a", "6fe9b308c2d714a5", "a2847615fb9e3cd0"]
                .map(row => [...row].map(digit => parseInt(digit, 16)))
const LANES = [[0,4,8,12], [1,5,9,13], [2,6,10,14], [3,7,11,15], [0,5,10,15], [1,6,11,12], [2,7,8,13], [3,4,9,14]]
const low64 = x => BigInt.asUintN(64, x), turned = (x, bits) => low64(x << BigInt(64 - bits)) | x >> BigInt(bits)

function compress(h, words, length, last) {
  const v = [...h, ...IV]
  v[12] ^= BigInt(length)
  if (last) v[14] = low64(~v[14])
  for (let round = 0; round < 12; round++) LANES.forEach(([a, b, c, d], i) => {
    const order = ORDERS[round % 10]
    v[a] = low64(v[a] + v[b] + words[order[2*i]]);     v[d] = turned(v[d]^v[a], 32)
    v[c] = low64(v[c] + v[d]);                         v[b] = turned(v[b]^v[c], 24)
    v[a] = low64(v[a] + v[b] + words[order[2*i + 1]]); v[d] = turned(v[d]^v[a], 16)
    v[c] = low64(v[c] + v[d]);                         v[b] = turned(v[b]^v[c], 63)
  })
  return h.map((x, i) => x^v[i]^v[i + 8])
}

// BLAKE2b (RFC 7693) of bytes to 16 bytes, personalised, as four little-endian words of 32 bits.
export function blake2b128(bytes, person) {
  const words = padded => [...new BigUint64Array(padded.buffer)]
  const parameters = new Uint8Array(64)
  parameters.set([16, 0, 1, 1])
  parameters.set(new TextEncoder().encode(person), 48)
  let h = words(parameters).map((word, i) => word^IV[i])
  for (let start = 0; start === 0 || start < bytes.length; start += 128) {
    const block = new Uint8Array(128), end = Math.min(bytes.length, start + 128)
    block.set(bytes.subarray(start, end))
    h = compress(h, words(block), end, end === bytes.length)
  }
  return new Uint32Array(new BigUint64Array(h).buffer, 0, 4).slice()
}

// The 128 bits that select the random words of a field.
export const fieldKey = (severity, name, seed, replicate) =>
  blake2b128(new TextEncoder().encode(fieldName(severity, name, seed, replicate)), "8-bit")

function highProduct(a, b) {                                              // upper 32 bits of a·b
  const a0 = a & 0xffff, a1 = a >>> 16, b0 = b & 0xffff, b1 = b >>> 16
  const middle = Math.imul(a1, b0) + (Math.imul(a0, b0) >>> 16) >>> 0
  const other = Math.imul(a0, b1) + (middle & 0xffff) >>> 0
  return Math.imul(a1, b1) + (middle >>> 16) + (other >>> 16)
}

// Four words of Philox4x32-10 of a counter (Salmon et al. 2011), into out from a place on.
export function philox(counter, [k0, k1], out, place = 0) {
  let [x0, x1, x2, x3] = counter
  for (let round = 0; round < 10; round++) {
    const high0 = highProduct(0xD2511F53, x0), low0 = Math.imul(0xD2511F53, x0)
    const high2 = highProduct(0xCD9E8D57, x2), low2 = Math.imul(0xCD9E8D57, x2)
    x0 = high2^x1^k0; x1 = low2; x2 = high0^x3^k1; x3 = low0
    k0 = k0 + 0x9E3779B9 | 0; k1 = k1 + 0xBB67AE85 | 0
  }
  out[place] = x0; out[place + 1] = x1; out[place + 2] = x2; out[place + 3] = x3
}

// Noisy grey levels of clean ones, row by row, from an alias table and the key of a field.
export function corrupt(clean, table, key) {
  const noisy = new Uint8Array(clean.length), words = new Uint32Array(4), counter = [0, 0, key[2], key[3]]
  for (let start = 0; start < clean.length; start += 4) {
    counter[0] = start/4
    philox(counter, key, words)
    for (let i = 0; i < 4 && start + i < clean.length; i++) {
      const word = words[i], entry = table[clean[start + i] << 8 | word & 255]
      noisy[start + i] = (word | 255) >>> 0 < entry ? word : entry        // is word >> 8 < entry >> 8?
    }
  }
  return noisy
}

const CRC = Uint32Array.from({length: 256}, (_, byte) => {
  for (let bit = 0; bit < 8; bit++) byte = byte & 1 ? byte >>> 1^0xEDB88320 : byte >>> 1
  return byte
})

// CRC-32 of an array's bytes, as zlib has it: a check on errors, not on intent.
export function crc32(array) {
  const bytes = new Uint8Array(array.buffer, array.byteOffset, array.byteLength)
  let crc = -1
  for (let i = 0; i < bytes.length; i++) crc = crc >>> 8^CRC[(crc^bytes[i]) & 255]
  return ~crc >>> 0
}
