// Radiographs from files, all in the page: {width, height, grey, note}, grey levels row by row. What has more than
// 8 bits is normalised by its own smallest and largest value, as the package does with a data set.

const refuse = why => { throw new Error(why) }
const LARGEST = 2**26                                                     // pixels: 8192 by 8192

function checkSize(width, height) {
  if (!(width > 0 && height > 0 && width*height <= LARGEST))
    refuse(`has ${width} × ${height} pixels, allowed are 1 to ${LARGEST}`)
}

// Grey levels of values that the mask, where there is one, does not call padding.
export function normalised(values, padding = () => false) {
  let low = Infinity, high = -Infinity
  for (const value of values) if (!padding(value)) { low = Math.min(low, value); high = Math.max(high, value) }
  if (!(low < high)) refuse(`has one grey value (${low}), nothing to normalise`)
  const nearest = x => x + 2**52 - 2**52                                  // ties to the even level
  return Uint8Array.from(values, value => padding(value) ? 0 : nearest((value - low)/(high - low)*255))
}

const SYNTAXES = {"1.2.840.10008.1.2": "implicit", "1.2.840.10008.1.2.1": "explicit"}
const LONG = ["OB", "OD", "OF", "OL", "OV", "OW", "SQ", "SV", "UC", "UN", "UR", "UT", "UV"]
const UNDEFINED = 0xFFFFFFFF

// The elements of a DICOM file up to its pixels: tag → bytes. Sequences are passed over.
function elements(view) {
  const found = new Map(), text = (at, n) => String.fromCharCode(...new Uint8Array(view.buffer, view.byteOffset + at, n))
  let at = 132, explicit = true, depth = 0
  while (at + 8 <= view.byteLength) {
    const group = view.getUint16(at, true), tag = group*65536 + view.getUint16(at + 2, true)
    if (group > 2 && !found.has("syntax")) {
      const name = found.has(0x20010) ? text(...found.get(0x20010)).replace(/[\0 ]+$/, "") : "unknown"
      const allowed = Object.keys(SYNTAXES).join(" and ")
      if (!SYNTAXES[name]) refuse(`has transfer syntax ${name}, allowed are uncompressed ones: ${allowed}`)
      found.set("syntax", name)
      explicit = SYNTAXES[name] === "explicit"
    }
    let length = view.getUint32(at + 4, true), start = at + 8, kind = ""
    if (explicit && group !== 0xFFFE) {
      kind = text(at + 4, 2)
      const long = LONG.includes(kind)
      if (long && at + 12 > view.byteLength) refuse("is cut off in its header")
      length = long ? view.getUint32(at + 8, true) : view.getUint16(at + 6, true)
      start = at + (long ? 12 : 8)
    }
    if (tag === 0xFFFEE0DD || tag === 0xFFFEE00D) { depth -= 1; at = start; continue } // end of a sequence or an item
    if (length === UNDEFINED) { depth += 1; at = start; continue }        // go through it: its end is marked
    if (start + length > view.byteLength)
      refuse(`is cut off: its header states ${start + length} bytes, it holds ${view.byteLength}`)
    if (!depth) found.set(tag, [start, length])
    if (tag === 0x7FE00010 && !depth) break
    at = start + length
  }
  return found
}

// One grey image of an uncompressed DICOM file, brighter is more.
export function readDicom(buffer) {
  const view = new DataView(buffer), found = elements(view)
  const text = (tag, otherwise) => {
    const [start, length] = found.get(tag) ?? []
    return length ? String.fromCharCode(...new Uint8Array(buffer, start, length)).replace(/[\0 ]+$/, "") : otherwise
  }
  const whole = (tag, name, otherwise) => found.get(tag)?.[1] ? view.getUint16(found.get(tag)[0], true)
    : otherwise ?? refuse(`has no ${name}: it is not a valid DICOM image`)
  if (!found.has(0x7FE00010)) refuse("has no pixel data")
  const height = whole(0x280010, "Rows"), width = whole(0x280011, "Columns"), kind = text(0x280004, "missing")
  const bits = whole(0x280100, "BitsAllocated"), signed = whole(0x280103, "PixelRepresentation")
  const frames = +text(0x280008, 1), slope = +text(0x281053, 1)
  checkSize(width, height)
  if (!["MONOCHROME1", "MONOCHROME2"].includes(kind))
    refuse(`has photometric interpretation ${kind}, allowed are MONOCHROME1 and MONOCHROME2`)
  if (bits !== 8 && bits !== 16) refuse(`has ${bits} bits allocated, allowed are 8 and 16`)
  if (frames > 1) refuse(`holds ${frames} frames: split it into single images`)
  if (found.has(0x283000)) refuse("has a modality lookup table, which is not read here")
  if (!slope) refuse(`has RescaleSlope ${text(0x281053)}, allowed are numbers other than 0`)
  const [start, length] = found.get(0x7FE00010), size = width*height*bits/8
  if (length < size) refuse(`holds ${length} bytes of pixels, its header states ${size}`)
  const get = bits === 8 ? (signed ? "getInt8" : "getUint8") : (signed ? "getInt16" : "getUint16")
  const stored = Float64Array.from({length: width*height}, (_, i) => view[get](start + i*bits/8, true))
  const sign = (kind === "MONOCHROME1") !== (slope < 0) ? -1 : 1
  const word = signed ? "getInt16" : "getUint16"
  const limit = tag => found.get(tag)?.[1] ? view[word](found.get(tag)[0], true) : undefined
  const ends = [limit(0x280120), limit(0x280121) ?? limit(0x280120)].sort((a, b) => a - b)
  const isPadding = value => value*sign >= ends[0] && value*sign <= ends[1]
  const values = stored.map(value => value*sign)
  return {width, height, grey: normalised(values, values.every(isPadding) ? undefined : isPadding),
          note: `DICOM, ${bits} bits, normalised by its own range`}
}

async function inflate(parts) {
  const stream = new Blob(parts).stream().pipeThrough(new DecompressionStream("deflate"))
  return new Uint8Array(await new Response(stream).arrayBuffer())
}

function unfilter(raw, stride, height, bytes) {
  const rows = new Uint8Array(stride*height)
  for (let y = 0; y < height; y++) for (let x = 0, filter = raw[y*(stride + 1)]; x < stride; x++) {
    const at = y*stride + x, left = x >= bytes ? rows[at - bytes] : 0, up = y ? rows[at - stride] : 0
    const corner = x >= bytes && y ? rows[at - stride - bytes] : 0, guess = left + up - corner
    const distances = [left, up, corner].map(v => Math.abs(guess - v))
    const paeth = [left, up, corner][distances.indexOf(Math.min(...distances))]
    rows[at] = raw[y*(stride + 1) + x + 1] + [0, left, up, left + up >> 1, paeth][filter]
  }
  return rows
}

// A grey PNG of 8 or 16 bits, without the browser's colour management and rounding; null for any other PNG.
export async function readGreyPng(buffer) {
  const view = new DataView(buffer), parts = []
  let header
  for (let at = 8; at + 12 <= view.byteLength; at += 12 + view.getUint32(at)) {
    const length = view.getUint32(at), name = view.getUint32(at + 4), start = at + 8
    if (start + length > view.byteLength) refuse("is a PNG file that is cut off")
    if (name === 0x49484452) header = {width: view.getUint32(start), height: view.getUint32(start + 4),
      bits: view.getUint8(start + 8), colour: view.getUint8(start + 9), interlaced: view.getUint8(start + 12)}
    if (name === 0x74524E53) return null                                  // transparency
    if (name === 0x49444154) parts.push(new Uint8Array(buffer, start, length))
  }
  if (!header || header.colour !== 0 || header.bits < 8 || header.interlaced) return null
  const {width, height, bits} = header, stride = width*bits/8
  checkSize(width, height)
  const raw = await inflate(parts).catch(() => refuse("is a damaged PNG file"))
  if (raw.length < (stride + 1)*height) refuse("is a PNG file that is cut off")
  const rows = unfilter(raw, stride, height, bits/8)
  if (bits === 8) return {width, height, grey: rows, note: "PNG, 8 bits"}
  const values = Float64Array.from({length: width*height}, (_, i) => 256*rows[2*i] + rows[2*i + 1])
  return {width, height, grey: normalised(values), note: "PNG, 16 bits, normalised by its own range"}
}

// Any other picture that the browser can decode; colour becomes luma.
async function readPicture(file) {
  const picture = await createImageBitmap(file, {colorSpaceConversion: "none"})
    .catch(() => refuse("is not a PNG, JPEG or DICOM file, or is damaged"))
  const {width, height} = picture
  checkSize(width, height)
  const context = new OffscreenCanvas(width, height).getContext("2d", {willReadFrequently: true})
  context.drawImage(picture, 0, 0)
  const {data} = context.getImageData(0, 0, width, height), grey = new Uint8Array(width*height)
  let gap = 0
  for (let i = 0; i < grey.length; i++) {
    const [r, g, b, alpha] = data.subarray(4*i, 4*i + 4)
    if (alpha < 255) refuse("is partly transparent: flatten it and save it without the alpha channel")
    gap = Math.max(gap, Math.max(r, g, b) - Math.min(r, g, b))
    grey[i] = Math.round(.299*r + .587*g + .114*b)
  }
  const note = gap ? `colour picture (channels differ by up to ${gap} levels), shown as luma` : "8 bits"
  return {width, height, grey, note}
}

// Read a file, or say in one line what is wrong with it.
export async function readRadiograph(file) {
  const buffer = await file.arrayBuffer(), bytes = new Uint8Array(buffer)
  const starts = (at, text) => [...text].every((c, i) => bytes[at + i] === c.charCodeAt(0))
  try {
    if (starts(128, "DICM")) return readDicom(buffer)
    return (starts(1, "PNG") && await readGreyPng(buffer)) || await readPicture(file)
  } catch (error) { throw new Error(`${file.name} ${error.message}`) }
}
