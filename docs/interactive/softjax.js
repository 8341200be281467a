"use strict";

// The functions of the pages, in the forms that softjax computes them: of the exponentials of a row
// that of one largest entry is known to be 1, so only the others are added, and log1p takes their
// sum. A test compares every function with the library. Units are nats, if nothing else is said.

(() => {
  /** The largest entry m of a row, its place, and the sum r of exp(x - m) over all the others. */
  function excess(x) {
    const max = Math.max(...x);
    const top = x.indexOf(max);
    const rest = x.reduce((sum, value, i) => (i === top ? sum : sum + Math.exp(value - max)), 0);
    return { max, top, rest };
  }

  /** log sum exp(x) = m + log1p(r). */
  function logsumexp(x) {
    const { max, rest } = excess(x);
    return max + Math.log1p(rest);
  }

  /** The probabilities exp(x - m) / (1 + r). */
  function softmax(x) {
    const { max, rest } = excess(x);
    return x.map((value) => Math.exp(value - max) / (1 + rest));
  }

  /** The logarithms of the probabilities, (x - m) - log1p(r). */
  function logSoftmax(x) {
    const { max, rest } = excess(x);
    return x.map((value) => value - max - Math.log1p(rest));
  }

  /** The entropy log1p(r) - sum p (x - m) of softmax(x): a sum of terms that are not negative. */
  function entropy(x) {
    const { max, rest } = excess(x);
    return softmax(x).reduce(
      (sum, p, i) => (p > 0 ? sum - p * (x[i] - max) : sum),
      Math.log1p(rest),
    );
  }

  /** RealSoftMax with lambda: log(sum exp(lambda x)) / lambda. */
  function smoothMax(x, lambda) {
    const { max, rest } = excess(x.map((value) => lambda * value));
    return (max + Math.log1p(rest)) / lambda;
  }

  /** How far smoothMax is above the maximum: log1p(r) / lambda, without taking a difference. */
  function smoothMaxGap(x, lambda) {
    return Math.log1p(excess(x.map((value) => lambda * value)).rest) / lambda;
  }

  /** The soft minimum, -smoothMax(-x). */
  function smoothMin(x, lambda) {
    return -smoothMax(
      x.map((value) => -value),
      lambda,
    );
  }

  /** The bounds of smoothMax: the maximum, and log(n) / lambda above it. */
  function smoothMaxBounds(x, lambda) {
    const max = Math.max(...x);
    return [max, max + Math.log(x.length) / lambda];
  }

  /** The Hessian of logsumexp: p_i (1 - p_i) on the diagonal, -p_i p_j beside it. */
  function hessian(x) {
    const p = softmax(x);
    // 1 - p_i is a sum of the other probabilities: it keeps its digits where p_i is near 1.
    const others = p.map((_, i) => p.reduce((sum, q, j) => (j === i ? sum : sum + q), 0));
    return p.map((pi, i) => p.map((pj, j) => (i === j ? pi * others[i] : -pi * pj)));
  }

  /** Mean and variance of the numbers v under the probabilities p. */
  function moments(p, v) {
    const mean = p.reduce((sum, pi, i) => sum + pi * v[i], 0);
    const variance = p.reduce((sum, pi, i) => sum + pi * (v[i] - mean) ** 2, 0);
    return { mean, variance };
  }

  /** v' H v for a matrix H. */
  function quadraticForm(matrix, v) {
    return matrix.reduce(
      (sum, row, i) => sum + v[i] * row.reduce((inner, h, j) => inner + h * v[j], 0),
      0,
    );
  }

  /**
   * Digits for each of m draws of one of k equally likely symbols, encoded together, base d: the
   * entropy; a block of one length; the best prefix code, whose words have L and L + 1 digits.
   */
  function digits(k, m, d) {
    const outcomes = BigInt(k) ** BigInt(m);
    const base = BigInt(d);
    let block = 0n,
      full = 1n;
    while (full < outcomes) {
      full *= base;
      block += 1n;
    }
    // All words of L digits would be too few; `split` of them are each split into d longer ones.
    const [length, short] = full === outcomes ? [block, full] : [block - 1n, full / base];
    const split = (outcomes - short + base - 2n) / (base - 1n);
    const longer = outcomes - (short - split);
    const mean = Number(length) + ratio(longer, outcomes);
    return { entropy: Math.log(k) / Math.log(d), block: Number(block) / m, prefix: mean / m };
  }

  /** a / b of large whole numbers, to the precision of a double. */
  function ratio(a, b) {
    return Number((a << 64n) / b) / 2 ** 64;
  }

  /** One draw after another of the classes 0, 1, ... with the probabilities p; the seed decides. */
  function draws(p, count, seed) {
    let state = seed >>> 0;
    const random = () => {
      // mulberry32, a generator of 32 bits.
      state = (state + 0x6d2b79f5) >>> 0;
      let t = Math.imul(state ^ (state >>> 15), state | 1);
      t ^= t + Math.imul(t ^ (t >>> 7), t | 61);
      return ((t ^ (t >>> 14)) >>> 0) / 2 ** 32;
    };
    return Array.from({ length: count }, () => {
      let left = random();
      const found = p.findIndex((probability) => (left -= probability) < 0);
      return found < 0 ? p.length - 1 : found;
    });
  }

  globalThis.softjax = {
    logsumexp,
    softmax,
    logSoftmax,
    entropy,
    smoothMax,
    smoothMaxGap,
    smoothMin,
    smoothMaxBounds,
    hessian,
    moments,
    quadraticForm,
    digits,
    draws,
  };
})();
