// What stands around a network: the radiograph at its size, as nbs/01_images makes it, masks, contours and Dice.

// Weights of an antialiased triangle, as Pillow has them: for each new pixel its first old one and their shares.
function triangle(from, to) {
  const scale = from/to, support = Math.max(scale, 1)
  return Array.from({length: to}, (_, x) => {
    const centre = (x + .5)*scale, first = Math.max(0, Math.trunc(centre - support + .5))
    const end = Math.min(from, Math.trunc(centre + support + .5))
    const shares = Array.from({length: end - first}, (_, i) =>
      Math.max(0, 1 - Math.abs((i + first - centre + .5)*(1/support))))
    const total = shares.reduce((sum, share) => sum + share, 0)
    return {first, shares: shares.map(share => share/total)}
  })
}

// Values of a square, row by row, at another size; rounded to single precision where Pillow rounds.
function resized(values, from, to) {
  const weights = triangle(from, to), rows = new Float32Array(from*to), out = new Float32Array(to*to)
  for (let y = 0; y < from; y++) weights.forEach(({first, shares}, x) => {
    rows[y*to + x] = shares.reduce((sum, share, i) => sum + values[y*from + first + i]*share, 0)
  })
  weights.forEach(({first, shares}, y) => {
    for (let x = 0; x < to; x++)
      out[y*to + x] = shares.reduce((sum, share, i) => sum + rows[(first + i)*to + x]*share, 0)
  })
  return out
}

// An image of any shape in a square of the size, padded with its darkest grey.
export function square(values, width, height, size) {
  const long = Math.max(width, height), left = long - width >> 1, top = long - height >> 1
  if (long > 20*Math.min(width, height))
    throw new Error(`is ${width} × ${height} pixels: one side is over 20 times the other`)
  const padded = new Float32Array(long*long).fill(values.reduce((low, value) => Math.min(low, value), Infinity))
  for (let y = 0; y < height; y++) padded.set(values.subarray(y*width, (y + 1)*width), (top + y)*long + left)
  return long === size ? padded : resized(padded, long, size)
}

// Where the image lies in its square: first and last pixel, plus one, along a side of n pixels.
function content(n, long, size) {
  const low = Math.ceil(Math.ceil((long - n)/2)*size/long), high = Math.floor(((long - n >> 1) + n)*size/long)
  return [low, Math.max(high, low + 1)]
}

// A radiograph {width, height, grey} as a network of that size gets it, before noise: normalised by its own range.
export function atSize({width, height, grey}, size) {
  const values = square(grey, width, height, size), long = Math.max(width, height)
  const [left, right] = content(width, long, size), [top, bottom] = content(height, long, size)
  let low = Infinity, high = -Infinity
  for (let y = top; y < bottom; y++) for (const value of values.subarray(y*size + left, y*size + right)) {
    low = Math.min(low, value)
    high = Math.max(high, value)
  }
  if (!(low < high)) throw new Error(`has one grey value (${low}) at ${size} pixels, nothing to normalise`)
  const nearest = x => x + 2**52 - 2**52                                  // ties to the even level
  const level = value => nearest(Math.min(1, Math.max(0, (value - low)/(high - low)))*255)
  return {width: size, height: size, grey: Uint8Array.from(values, level)}
}

// A mask of zeros and ones at the size.
export const maskAtSize = (mask, width, height, size) =>
  Uint8Array.from(square(mask, width, height, size), share => +(share >= .5))

// Which pixels of k outputs, one after the other, count as found: (k, n).
export function foundMasks(values, k, threshold) {
  const n = values.length/k
  return Array.from({length: k}, (_, i) => Uint8Array.from(values.subarray(i*n, (i + 1)*n), v => +(v > threshold)))
}

export function dice(one, other) {
  let both = 0, sum = 0
  one.forEach((pixel, i) => { both += pixel & other[i]; sum += pixel + other[i] })
  return sum ? 2*both/sum : 1
}

// The edges between pixels in and out of a mask, in pixels: [x, y, x, y].
export function edges(mask, size) {
  const found = [], at = (x, y) => x >= 0 && y >= 0 && x < size && y < size ? mask[y*size + x] : 0
  for (let y = 0; y <= size; y++) for (let x = 0; x <= size; x++) {
    if (at(x, y) !== at(x, y - 1)) found.push([x, y, x + 1, y])
    if (at(x, y) !== at(x - 1, y)) found.push([x, y, x, y + 1])
  }
  return found
}
