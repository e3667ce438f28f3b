"use strict";
// The algebra behind the page, on vectors as lists and matrices as lists of rows. A layer is { beta, k, v }.
// Tests compare it with deepdelta.DeltaOperator; formulas: docs/method.md#the-operator.

const ROUNDING = 8 * Number.EPSILON; // strengths closer than this to 0, 1 and 2 count as equal

const dot = (a, b) => a.reduce((sum, x, i) => sum + x * b[i], 0);
const norm = (a) => Math.hypot(...a);
const plus = (a, b, factor = 1) => a.map((x, i) => x + factor * b[i]);
const scaled = (a, factor) => a.map((x) => factor * x);
const identity = (d) => Array.from({ length: d }, (_, i) => Array.from({ length: d }, (_, j) => Number(i === j)));
const transpose = (M) => M[0].map((_, j) => M.map((row) => row[j]));
const multiply = (A, B) => {
  const columns = transpose(B);
  return A.map((row) => columns.map((column) => dot(row, column)));
};

// I - beta k k^T
const dense = ({ beta, k }) => identity(k.length).map((row, i) => row.map((x, j) => x - beta * k[i] * k[j]));
// beta n with n = |k|^2: what the regime depends on
const strength = ({ beta, k }) => beta * dot(k, k);
// e = k^T x - v
const error = ({ k, v }, x) => dot(k, x) - v;
// x + beta k (v - k^T x)
const rewrite = (layer, x) => plus(x, layer.k, -layer.beta * error(layer, x));
// A_L ... A_1, the first layer acting first
const product = (layers) => layers.reduce((M, layer) => multiply(dense(layer), M), identity(layers[0].k.length));
// det(A_L ... A_1)^V
const determinant = (layers, channels = 1) => layers.reduce((value, layer) => value * (1 - strength(layer)), 1) ** channels;

function regime(layer) {
  const s = strength(layer);
  for (const [value, name] of [[0, "identity"], [1, "projection"], [2, "reflection"]]) {
    if (Math.abs(s - value) <= ROUNDING) return name;
  }
  return s > 0 && s < 1 ? "under-relaxed" : s > 1 && s < 2 ? "over-relaxed" : "unstable";
}

// The orthogonal factor of M = Q R, by reflections.
function orthogonal(M) {
  let [Q, R] = [identity(M.length), M];
  for (let c = 0; c < M.length - 1; c += 1) {
    const u = R.map((row, i) => (i < c ? 0 : row[c]));
    u[c] += (u[c] < 0 ? -1 : 1) * norm(u);
    const size = norm(u);
    if (size === 0) continue;
    const reflection = dense({ beta: 2, k: scaled(u, 1 / size) });
    [Q, R] = [multiply(Q, reflection), multiply(reflection, R)];
  }
  return Q;
}

function pair(a, b, c, d) {
  const [middle, half] = [(a + d) / 2, (a - d) / 2];
  const square = half * half + b * c;
  const root = Math.sqrt(Math.abs(square));
  return square >= 0 ? [[middle - root, 0], [middle + root, 0]] : [[middle, -root], [middle, root]];
}

// Eigenvalues [real, imaginary] of a matrix of at most 3 x 3, by real part: QR steps with both shifts at once.
function eigenvalues(M) {
  const by = (values) => values.sort((x, y) => x[0] - y[0] || x[1] - y[1]);
  if (M.length === 1) return [[M[0][0], 0]];
  if (M.length === 2) return by(pair(M[0][0], M[0][1], M[1][0], M[1][1]));
  const small = 4 * Number.EPSILON * norm(M.flat());
  const head = (H) => Math.hypot(H[1][0], H[2][0]);
  const tail = (H) => Math.hypot(H[2][0], H[2][1]);
  let H = M;
  for (let step = 1; step < 200 && Math.min(head(H), tail(H)) > small; step += 1) {
    // Every tenth shift is another one, out of a cycle.
    const [a, b, c, d] = step % 10 ? [H[1][1], H[1][2], H[2][1], H[2][2]] : [norm(H[2]), 0, 0, -0.4 * norm(H[1])];
    const shifted = multiply(H, H).map((row, i) => row.map((x, j) => x - (a + d) * H[i][j] + (i === j ? a * d - b * c : 0)));
    const Q = orthogonal(shifted);
    H = multiply(transpose(Q), multiply(H, Q));
  }
  if (head(H) < tail(H)) return by([[H[0][0], 0], ...pair(H[1][1], H[1][2], H[2][1], H[2][2])]);
  return by([[H[2][2], 0], ...pair(H[0][0], H[0][1], H[1][0], H[1][1])]);
}

// Singular values, largest first: columns made orthogonal by rotations.
function singularValues(M) {
  const columns = transpose(M);
  for (let sweep = 0; sweep < 30; sweep += 1) {
    let turned = false;
    for (let p = 0; p < columns.length; p += 1) {
      for (let q = p + 1; q < columns.length; q += 1) {
        const [a, b, c] = [dot(columns[p], columns[p]), dot(columns[q], columns[q]), dot(columns[p], columns[q])];
        if (Math.abs(c) <= Number.EPSILON * Math.sqrt(a * b)) continue;
        turned = true;
        const zeta = (b - a) / (2 * c);
        const t = (zeta < 0 ? -1 : 1) / (Math.abs(zeta) + Math.hypot(1, zeta));
        const cosine = 1 / Math.hypot(1, t);
        const [x, y] = [columns[p], columns[q]];
        columns[p] = x.map((_, i) => cosine * (x[i] - t * y[i]));
        columns[q] = x.map((_, i) => cosine * (t * x[i] + y[i]));
      }
    }
    if (!turned) break;
  }
  return columns.map(norm).sort((x, y) => y - x);
}

// The factor on the error after time 1: n steps of size 1/n, and the flow of the depth ODE.
const refined = (s, steps) => (1 - s / steps) ** steps;
const flow = (s) => Math.exp(-s);

// Spherical coordinates in degrees to a vector.
function vector(dim, { angle, height, length }) {
  const [a, h] = [(angle * Math.PI) / 180, dim === 3 ? (height * Math.PI) / 180 : 0];
  const unit = [Math.cos(h) * Math.cos(a), Math.cos(h) * Math.sin(a), Math.sin(h)].slice(0, dim);
  return scaled(unit, length);
}

if (typeof module !== "undefined") {
  module.exports = { determinant, eigenvalues, error, flow, product, refined, regime, rewrite, singularValues, strength, vector };
}
