// The 8-bit noise channel: nbs/00a_noise and nbs/00b_channel again, step for step, for sources without neighbours.

const SQRT_HALF = Math.SQRT1_2, ERFC_ENDS = 26.7, TWO32 = 2**32
const polynomial = (x, coefficients, start) => coefficients.reduce((sum, c) => sum*x + c, start)

// Coefficients of Cephes 2.9 (Moshier 2000), which SciPy's ndtr uses too: the rounding is to be the same.
const P = [2.46196981473530512524e-10, 5.64189564831068821977e-1, 7.46321056442269912687, 4.86371970985681366614e1,
           1.96520832956077098242e2, 5.26445194995477358631e2, 9.34528527171957607540e2, 1.02755188689515710272e3,
           5.57535335369399327526e2]
const Q = [1.32281951154744992508e1, 8.67072140885989742329e1, 3.54937778887819891062e2, 9.75708501743205489753e2,
           1.82390916687909736289e3, 2.24633760818710981792e3, 1.65666309194161350182e3, 5.57535340817727675546e2]
const R = [5.64189583547755073984e-1, 1.27536670759978104416, 5.01905042251180477414, 6.16021097993053585195,
           7.40974269950448939160, 2.97886665372100240670]
const S = [2.26052863220117276590, 9.39603524938001434673, 1.20489539808096656605e1, 1.70814450747565897222e1,
           9.60896809063285878198, 3.36907645100081516050]
const T = [9.60497373987051638749, 9.00260197203842689217e1, 2.23200534594684319226e3, 7.00332514112805075473e3,
           5.55923013010394962768e4]
const U = [3.35617141647503099647e1, 5.21357949780152679795e2, 4.59432382970980127987e3, 2.26290000613890934246e4,
           4.92673942608635921086e4]

function erfc(x) {                                                        // x ≥ 1
  if (x > ERFC_ENDS) return 0
  const size = Math.exp(-x*x)
  return x < 8 ? size*polynomial(x, P, 0)/polynomial(x, Q, 1) : size*polynomial(x, R, 0)/polynomial(x, S, 1)
}

// P(Z ≤ a) of a standard normal Z.
export function ndtr(a) {
  const x = a*SQRT_HALF, z = Math.abs(x)
  if (z < 1) return .5 + .5*(x*polynomial(x*x, T, 0)/polynomial(x*x, U, 1))
  const tail = .5*erfc(z)
  return x > 0 ? 1 - tail : tail
}

// How far a Poisson count lies from its mean: further, on one side, with probability < 1e-17 (Bernstein).
const reach = mean => 13.1 + Math.sqrt(172 + 78.4*mean)

// Probabilities of the counts first, first + 1, …, of a given mean; from the mode outwards, so that none is lost.
export function poisson(mean) {
  const mode = Math.floor(mean), first = Math.max(0, Math.floor(mean - reach(mean)))
  const p = new Float64Array(Math.ceil(mean + reach(mean)) - first + 1)
  p[mode - first] = 1
  for (let k = mode; k > first; k--) p[k - 1 - first] = p[k - first]*k/mean
  for (let k = mode + 1; k < first + p.length; k++) p[k - first] = p[k - 1 - first]*mean/k
  const total = p.reduce((sum, x) => sum + x)
  return {first, p: p.map(x => x/total)}
}

// The largest numbers that still round to level 0, 1, … 254, ties to the even level.
const BOUNDS = Float64Array.from({length: 255}, (_, j) => {
  const middle = (j + .5)/255, half = 2**(Math.floor(Math.log2(middle)) - 53)
  const stays = x => x*255 < j + .5 || (x*255 === j + .5 && j % 2 === 0)
  let bound = 0
  for (let k = -9; k < 9; k++) if (stays(middle + k*half)) bound = middle + k*half
  return bound
})

const N0 = 1000, SIGMA0 = .1
export const photonsPerPixel = severity => severity ? N0/severity/severity : Infinity

// P(value ≤ bound) of a value y after speckle and readout noise: together one normal law.
function afterwards({speckle = 0, electronic = 0}) {
  return (y, bound) => {
    const sd = Math.hypot(.1*speckle*y, SIGMA0*electronic)
    return sd > 0 ? ndtr((bound - y)/sd) : +(bound >= y)
  }
}

// Photon noise alone: the distribution function of the count at each bound.
function countRow(photons, intensity, below) {
  const {first, p} = poisson(intensity*photons)
  for (let k = 1; k < p.length; k++) p[k] += p[k - 1]
  BOUNDS.forEach((bound, j) => {
    let count = Math.floor(bound*photons)
    if ((count + 1)/photons <= bound) count++
    if (count/photons > bound) count--
    below[j] = count < first ? 0 : p[Math.min(count - first, p.length - 1)]
  })
}

// Photon noise, then any other: the sum over the counts.
function sumOverCounts(photons, rest, below) {
  const steps = Array.from({length: Math.ceil(photons + reach(photons)) + 1},
                           (_, k) => BOUNDS.map(bound => rest(k/photons, bound)))
  for (let g = 0; g < 256; g++) {
    const {first, p} = poisson(g/255*photons), row = below.subarray(255*g, 255*g + 255)
    p.forEach((weight, i) => { const step = steps[first + i]; for (let j = 0; j < 255; j++) row[j] += weight*step[j] })
  }
}

// Photon and readout noise where photons are many: the characteristic function, inverted.
function invertCharacteristic(photons, sigma, below) {
  const h = reach(photons)/photons + 8.9*sigma, terms = []
  for (let m = 1; m <= Math.floor(9*h/(Math.PI*sigma)) + 1; m++) {
    const x = Math.PI*m/h/photons, t = x*photons
    if ((sigma*t)**2/2 >= 40) break
    terms.push({x, t, sign: m % 2 ? -1 : 1, cos: BOUNDS.map(b => Math.cos(t*b)), sin: BOUNDS.map(b => Math.sin(t*b))})
  }
  for (let g = 0; g < 256; g++) {
    const mean = g/255*photons, half = reach(mean)/photons + 8.9*sigma, row = below.subarray(255*g, 255*g + 255)
    let edge = 0
    for (const {x, t, sign, cos, sin} of terms) {
      const fall = 2*mean*Math.sin(x/2)**2 + (sigma*t)**2/2
      if (fall > 40) continue
      const size = Math.exp(-fall)/t, turn = mean*Math.sin(x), a = size*Math.sin(turn), b = size*Math.cos(turn)
      edge += sign*size*Math.sin(mean*(Math.sin(x) - x))
      for (let j = 0; j < 255; j++) row[j] -= a*cos[j] - b*sin[j]
    }
    for (let j = 0; j < 255; j++) {
      const d = BOUNDS[j] - g/255
      row[j] = Math.abs(d) < half ? Math.min(1, Math.max(0, .5 + d/(2*h) + (edge + row[j])/h)) : +(d >= 0)
    }
  }
}

// P(noisy level ≤ j | clean level g), (256, 255), row by row, of severities by source.
export function distribution(severity) {
  const {quantum = 0, electronic = 0, speckle = 0, salt_pepper = 0} = severity
  const below = new Float64Array(256*255), photons = photonsPerPixel(quantum), rest = afterwards(severity)
  const others = speckle > 0 || electronic > 0
  if (quantum && speckle && photons > 20000)
    throw new Error(`speckle beside quantum noise needs a quantum severity of at least 0.224 here, got ${quantum}`)
  if (quantum && !others) for (let g = 0; g < 256; g++) countRow(photons, g/255, below.subarray(255*g, 255*g + 255))
  else if (quantum && !speckle && SIGMA0*electronic*photons >= 1.5)
    invertCharacteristic(photons, SIGMA0*electronic, below)
  else if (quantum) sumOverCounts(photons, rest, below)
  else for (let i = 0; i < below.length; i++) below[i] = rest(Math.floor(i/255)/255, BOUNDS[i % 255])
  return salt_pepper ? below.map(p => (1 - salt_pepper/100)*p + salt_pepper/200) : below
}

// P(noisy level j | clean level g), (256, 256), row by row.
export function channel(severity) {
  const below = distribution(severity), pmf = new Float64Array(65536)
  for (let g = 0; g < 256; g++) {
    let last = 0
    for (let j = 0; j < 255; j++) {
      const upto = Math.max(last, Math.min(1, Math.max(0, below[255*g + j])))
      pmf[256*g + j] = upto - last
      last = upto
    }
    pmf[256*g + 255] = 1 - last
  }
  return pmf
}

// P(noisy level ≤ j | clean level g) in units of 2⁻³², (256, 256).
export function cumulated(pmf) {
  const units = new Float64Array(65536), nearest = x => x + 2**52 - 2**52  // ties to the even number
  for (let g = 0; g < 256; g++) {
    let sum = 0
    for (let j = 0; j < 256; j++) {
      sum += pmf[256*g + j]
      units[256*g + j] = j === 255 ? TWO32 : Math.min(nearest(sum*TWO32), TWO32)
    }
  }
  return units
}

// Alias tables in integers: 24 bits of threshold, 8 of alias, for each grey and column (Vose 1991).
export function aliasTable(units) {
  const table = new Uint32Array(65536), left = new Float64Array(256), full = 2**24
  for (let g = 0; g < 65536; g += 256) {
    const small = [], large = []
    for (let j = 0; j < 256; j++) {
      left[j] = units[g + j] - (j ? units[g + j - 1] : 0);
      (left[j] < full ? small : large).push(j)
    }
    while (small.length) {
      const j = small.pop(), k = large.pop()
      table[g + j] = left[j]*256 + k
      left[k] -= full - left[j];
      (left[k] < full ? small : large).push(k)
    }
    for (const j of large) table[g + j] = j
  }
  return table
}

// Mean, SD and signal-to-noise ratio of each clean level after noise, in units of full intensity.
export function moments(pmf) {
  return Array.from({length: 256}, (_, g) => {
    let mean = 0, variance = 0
    for (let j = 0; j < 256; j++) mean += pmf[256*g + j]*j/255
    for (let j = 0; j < 256; j++) variance += pmf[256*g + j]*(j/255 - mean)**2
    const sd = Math.sqrt(variance)
    return {mean, sd, snr: sd > 0 ? mean/sd : Infinity}
  })
}

// Bits that a noisy pixel tells about the clean one, whose levels occur as often as the histogram says (Shannon 1948).
export function information(pmf, histogram) {
  const total = histogram.reduce((sum, n) => sum + n), noisy = new Float64Array(256)
  const plogp = p => p > 0 ? p*Math.log2(p) : 0
  let kept = 0
  histogram.forEach((n, g) => {
    if (n) for (let j = 0; j < 256; j++) {
      noisy[j] += n/total*pmf[256*g + j]
      kept += n/total*plogp(pmf[256*g + j])
    }
  })
  return Math.max(0, kept - noisy.reduce((sum, p) => sum + plogp(p), 0))
}
