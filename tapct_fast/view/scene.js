"use strict";
// What the page carries, unpacked, and the numbers at a place.
// Voxels and tokens are addressed [z, y, x]; z grows to the head, y to the back, x to the left.
// Volumes of voxels and of tokens are flat arrays with x fastest.

const DIRECTIONS = ["LR", "PA", "IS"]; // toward lower and higher x, y, z of the world (RAS mm)

async function unpack(name) {
  const text = document.getElementById(`data-${name}`).textContent;
  const bytes = Uint8Array.from(atob(text), (c) => c.charCodeAt(0));
  const stream = new Blob([bytes]).stream().pipeThrough(new DecompressionStream("deflate"));
  return new Uint8Array(await new Response(stream).arrayBuffer());
}

function uint16(bytes) {
  const count = bytes.length / 2;
  const values = new Uint16Array(count);
  for (let i = 0; i < count; i++) values[i] = bytes[i] | (bytes[count + i] << 8);
  return values;
}

function hounsfield(bytes, rowLength) {
  const coded = uint16(bytes);
  const hu = new Int16Array(coded.length);
  for (let i = 0; i < hu.length; i++) {
    const step = (coded[i] >>> 1) ^ -(coded[i] & 1); // zigzag
    hu[i] = (i % rowLength ? hu[i - 1] : 0) + step;
  }
  return hu;
}

const clamp = (value, low, high) => Math.min(Math.max(value, low), high);
const product = (sizes) => sizes.reduce((a, b) => a * b, 1);
const flat = ([z, y, x], [, sizeY, sizeX]) => (z * sizeY + y) * sizeX + x;

// Multiplies a (4, 4) affine, which takes x, y, z, with [z, y, x]; returns x, y, z of the result.
function transform(affine, [z, y, x]) {
  return [0, 1, 2].map((i) => {
    const [a, b, c, d] = affine[i];
    return a * x + b * y + c * z + d;
  });
}

const position = (ras) =>
  ras.map((mm, i) => `${DIRECTIONS[i][+(mm >= 0)]} ${Math.abs(mm).toFixed(1)}`).join("  ");

// Everything that does not change while the page is looked at.
async function loadScene() {
  const meta = JSON.parse(document.getElementById("data-meta").textContent);
  const { shape, grid, factor, spacing } = meta;
  const numTokens = product(grid);
  const hu = hounsfield(await unpack("hu"), shape[2]);
  const pca = await unpack("pca");
  const attention = uint16(await unpack("attention"));
  const codes = new Int8Array((await unpack("tokens")).buffer);
  const labels = await Promise.all(meta.labelMaps.map((_, i) => unpack(`labels-${i}`)));
  const inBody = Uint8Array.from({ length: numTokens }, (_, i) => +(pca[3 * i] > 0));
  const norms = tokenNorms();

  function tokenNorms() {
    const sums = new Float32Array(numTokens);
    for (let k = 0; k < meta.components; k++) {
      const scale = meta.componentScale[k];
      for (let i = 0; i < numTokens; i++) sums[i] += (scale * codes[k * numTokens + i]) ** 2;
    }
    return sums.map((sum) => Math.max(Math.sqrt(sum), 1e-12));
  }

  function tokenAlong(axis, voxel) {
    return clamp(
      Math.round((voxel - meta.tokenShift[axis]) / meta.tokenScale[axis]), 0, grid[axis] - 1);
  }

  const tokenAt = (voxel) => voxel.map((v, axis) => tokenAlong(axis, v));

  // The cosine of one token to each, and the ends of its colours: half of the body stays clear.
  function similarityTo(token) {
    const asked = flat(token, grid);
    const similarity = new Float32Array(numTokens);
    for (let k = 0; k < meta.components; k++) {
      const weight = meta.componentScale[k] ** 2 * codes[k * numTokens + asked];
      for (let i = 0; i < numTokens; i++) similarity[i] += weight * codes[k * numTokens + i];
    }
    for (let i = 0; i < numTokens; i++) similarity[i] /= norms[i] * norms[asked];
    const body = similarity.filter((_, i) => inBody[i]).sort();
    return { similarity, range: [Math.min(body[body.length >> 1], 0.999), 1] };
  }

  // Of one head, counted from 1, or of their mean (0).
  function attentionAt(token, head) {
    if (head > 0 || !meta.heads.length) {
      const row = Math.max(head - 1, 0);
      return attention[row * numTokens + token] * meta.attentionStep[row];
    }
    let sum = 0;
    meta.attentionStep.forEach((step, row) => (sum += attention[row * numTokens + token] * step));
    return sum / meta.attentionStep.length;
  }

  function describe(voxel, head, similarity) {
    const volumeVoxel = voxel.map((v, a) => v * factor[a] + (factor[a] - 1) / 2);
    const ras = transform(meta.affine, voxel);
    const token = tokenAt(voxel);
    const names = meta.labelMaps.map((map, i) => {
      const place = labels[i][flat(voxel, shape)];
      return [map.title, place ? map.labels[place - 1].name : "background"];
    });
    return {
      hu: hu[flat(voxel, shape)],
      ras,
      file: transform(meta.toFile, volumeVoxel).map(Math.round),
      token,
      attention: attentionAt(flat(token, grid), head),
      similarity: similarity[flat(token, grid)],
      names,
    };
  }

  // The voxel of a label that is nearest to its centre of mass; nothing if it was thinned away.
  function middleOf(number, place) {
    const found = [];
    labels[number].forEach((value, i) => value === place && found.push(i));
    if (!found.length) return null;
    const voxelOf = (i) => [
      Math.floor(i / (shape[1] * shape[2])), Math.floor(i / shape[2]) % shape[1], i % shape[2]];
    const centre = [0, 0, 0];
    found.forEach((i) => voxelOf(i).forEach((v, a) => (centre[a] += v / found.length)));
    const apart = (voxel) =>
      voxel.reduce((sum, v, a) => sum + ((v - centre[a]) * spacing[a]) ** 2, 0);
    let best = voxelOf(found[0]);
    found.forEach((i) => {
      const voxel = voxelOf(i);
      if (apart(voxel) < apart(best)) best = voxel;
    });
    return best;
  }

  // From a voxel of the scan to one of the page, and back to the middle of what was averaged.
  const toPage = (voxel) =>
    voxel.map((v, a) => clamp(Math.floor(v / factor[a]), 0, shape[a] - 1));
  const fromPage = (voxel) =>
    voxel.map((v, a) => Math.min(v * factor[a] + (factor[a] >> 1), meta.size[a] - 1));

  return {
    meta, hu, pca, labels, inBody,
    tokenAlong, tokenAt, similarityTo, attentionAt, describe, middleOf, toPage, fromPage,
  };
}
