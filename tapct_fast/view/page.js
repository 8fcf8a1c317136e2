"use strict";
// Voxels and tokens are addressed [z, y, x]; z grows to the head, y to the back, x to the left.
// Volumes of voxels and of tokens are flat arrays with x fastest.

const PRESETS = {
  // centre and width in HU
  lung: [-600, 1500],
  soft: [40, 400],
  bone: [400, 1800],
  brain: [40, 80],
};
const PRESET_NAMES = { lung: "Lung", soft: "Soft tissue", bone: "Bone", brain: "Brain" };
// The axes across a plane, down and right; slices count from the feet, so z is drawn upwards.
const PLANES = {
  axial: { axis: 0, down: 1, right: 2, color: "#f26d6d" },
  coronal: { axis: 1, down: 0, right: 2, color: "#5fc98b" },
  sagittal: { axis: 2, down: 0, right: 1, color: "#e8c14e" },
};
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
const byId = (id) => document.getElementById(id);

function element(name, properties, ...children) {
  const made = Object.assign(document.createElement(name), properties);
  made.append(...children);
  return made;
}

// Multiplies a (4, 4) affine, which takes x, y, z, with [z, y, x]; returns x, y, z of the result.
function transform(affine, [z, y, x]) {
  return [0, 1, 2].map((i) => {
    const [a, b, c, d] = affine[i];
    return a * x + b * y + c * z + d;
  });
}

async function main() {
  const root = byId("viewer");
  const meta = JSON.parse(byId("data-meta").textContent);
  const { shape, grid, spacing, factor } = meta;
  const numTokens = product(grid);
  const hu = hounsfield(await unpack("hu"), shape[2]);
  const pca = await unpack("pca");
  const attention = uint16(await unpack("attention"));
  const codes = new Int8Array((await unpack("tokens")).buffer);
  const labels = await Promise.all(meta.labelMaps.map((_, i) => unpack(`labels-${i}`)));
  const inBody = Uint8Array.from({ length: numTokens }, (_, i) => +(pca[3 * i] > 0));
  const norms = tokenNorms();

  const LAYERS = { ct: "CT only", pca: "Features", attention: "Attention", similarity: "Similarity" };
  meta.labelMaps.forEach((map) => {
    LAYERS[map.title] = map.title[0].toUpperCase() + map.title.slice(1);
  });
  const firstHeads = ["mean", ...meta.heads];
  const pageVoxel = (volumeVoxel) =>
    volumeVoxel.map((v, a) => clamp(Math.floor(v / factor[a]), 0, shape[a] - 1));
  const state = {
    at: pageVoxel(meta.middle),
    query: null, // a token
    layer: "pca",
    level: PRESETS.soft[0],
    width: PRESETS.soft[1],
    opacity: 60,
    head: 0,
  };
  let similarity = new Float32Array(numTokens);
  let similarityRange = [0, 1];
  let isWaiting = false;
  let writing = 0;

  // --- numbers at a place ---

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

  function ask(token) {
    state.query = token;
    const asked = flat(token, grid);
    similarity = new Float32Array(numTokens);
    for (let k = 0; k < meta.components; k++) {
      const weight = meta.componentScale[k] ** 2 * codes[k * numTokens + asked];
      for (let i = 0; i < numTokens; i++) similarity[i] += weight * codes[k * numTokens + i];
    }
    for (let i = 0; i < numTokens; i++) similarity[i] /= norms[i] * norms[asked];
    const body = similarity.filter((_, i) => inBody[i]).sort();
    similarityRange = [Math.min(body[body.length >> 1], 0.999), 1];
  }

  function attentionAt(token) {
    if (state.head > 0 || !meta.heads.length) {
      const head = Math.max(state.head - 1, 0);
      return attention[head * numTokens + token] * meta.attentionStep[head];
    }
    let sum = 0;
    meta.attentionStep.forEach((step, head) => (sum += attention[head * numTokens + token] * step));
    return sum / meta.attentionStep.length;
  }

  function describe(voxel) {
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
      attention: attentionAt(flat(token, grid)),
      similarity: similarity[flat(token, grid)],
      names,
    };
  }

  const position = (ras) =>
    ras.map((mm, i) => `${DIRECTIONS[i][+(mm >= 0)]} ${Math.abs(mm).toFixed(1)}`).join("  ");

  // --- drawing ---

  const panes = [...document.querySelectorAll("figure.pane")].map((figure) => {
    const plane = PLANES[figure.dataset.plane];
    const canvas = element("canvas", { tabIndex: 0 });
    canvas.setAttribute("role", "img");
    const dot = element("i");
    dot.style.background = plane.color;
    const text = element("span");
    const pointer = element("div", { className: "pointer" });
    figure.append(canvas, element("figcaption", {}, dot, text), pointer);
    return { name: figure.dataset.plane, figure, canvas, text, pointer, plane };
  });

  const huColor = () => {
    const low = state.level - state.width / 2;
    return Uint8ClampedArray.from({ length: 4096 }, (_, i) =>
      Math.floor(clamp(((i - 1024 - low) * 255) / state.width, 0, 255)));
  };

  // Fills a picture of a plane: paint(index, pixels, at) colours one voxel or token of a volume.
  function picture(sizes, { axis, down, right }, at, paint) {
    const strides = [sizes[1] * sizes[2], sizes[2], 1];
    const image = new ImageData(sizes[right], sizes[down]);
    for (let row = 0; row < image.height; row++) {
      const i = down === 0 ? sizes[0] - 1 - row : row;
      const start = at * strides[axis] + i * strides[down];
      for (let column = 0; column < image.width; column++) {
        paint(start + column * strides[right], image.data, 4 * (row * image.width + column));
      }
    }
    const canvas = new OffscreenCanvas(image.width, image.height);
    canvas.getContext("2d").putImageData(image, 0, 0);
    return canvas;
  }

  function heatPainter(valueOf, [low, high]) {
    return (token, pixels, to) => {
      if (!inBody[token]) return;
      const color = 4 * Math.round(clamp((valueOf(token) - low) / (high - low), 0, 1) * 255);
      for (let c = 0; c < 4; c++) pixels[to + c] = meta.heat[color + c];
    };
  }

  function overlayPainter() {
    if (state.layer === "pca") {
      return (token, pixels, to) => {
        for (let c = 0; c < 3; c++) pixels[to + c] = pca[3 * token + c];
        pixels[to + 3] = 255 * inBody[token];
      };
    }
    if (state.layer === "attention") {
      return heatPainter(attentionAt, meta.attentionRange[state.head]);
    }
    return heatPainter((token) => similarity[token], similarityRange);
  }

  const labelsShown = () => meta.labelMaps.findIndex((map) => map.title === state.layer);

  function labelPainter(number) {
    const colors = meta.labelMaps[number].labels.map((label) => label.color);
    return (voxel, pixels, to) => {
      const place = labels[number][voxel];
      if (!place) return;
      for (let c = 0; c < 3; c++) pixels[to + c] = colors[place - 1][c];
      pixels[to + 3] = 255;
    };
  }

  // Places a plane in its pane at true proportions: pixels per voxel, and where its picture begins.
  function layout({ canvas, plane }) {
    const ratio = window.devicePixelRatio || 1;
    const [paneX, paneY] = [canvas.clientWidth, canvas.clientHeight].map((s) => s * ratio);
    const [mmX, mmY] = [plane.right, plane.down].map((a) => shape[a] * spacing[a]);
    const margin = 42 * ratio; // for the letters
    const scale = Math.max(Math.min((paneX - margin) / mmX, (paneY - margin) / mmY), 0.01);
    const [w, h] = [mmX * scale, mmY * scale];
    return {
      ratio, scale, w, h, paneX, paneY, left: (paneX - w) / 2, top: (paneY - h) / 2,
      perRight: spacing[plane.right] * scale, perDown: spacing[plane.down] * scale,
    };
  }

  // Where the edge in front of a voxel (a fraction counts) lies on the pane.
  const edgeX = (box, x) => box.left + x * box.perRight;
  const edgeY = (box, plane, y) =>
    box.top + (plane.down === 0 ? shape[0] - y : y) * box.perDown;

  // Left, top, width and height of tokens first to last (counted along an axis) on the pane.
  function tokenRect(box, plane, firstDown, lastDown, firstRight, lastRight) {
    const edge = (axis, token) =>
      meta.tokenShift[axis] + 0.5 + (token - 0.5) * meta.tokenScale[axis];
    const x = [firstRight, lastRight + 1].map((t) => edgeX(box, edge(plane.right, t)));
    const y = [firstDown, lastDown + 1].map((t) => edgeY(box, plane, edge(plane.down, t)));
    return [x[0], Math.min(...y), x[1] - x[0], Math.abs(y[1] - y[0])];
  }

  function draw(pane, grey) {
    const { canvas, plane } = pane;
    const box = layout(pane);
    canvas.width = Math.round(box.paneX);
    canvas.height = Math.round(box.paneY);
    const context = canvas.getContext("2d");
    const at = state.at[plane.axis];
    context.imageSmoothingQuality = "high";
    const ct = picture(shape, plane, at, (voxel, pixels, to) => {
      const value = grey[hu[voxel] + 1024];
      pixels[to] = pixels[to + 1] = pixels[to + 2] = value;
      pixels[to + 3] = 255;
    });
    context.drawImage(ct, box.left, box.top, box.w, box.h);
    if (state.layer !== "ct") {
      context.save();
      context.beginPath();
      context.rect(box.left, box.top, box.w, box.h);
      context.clip();
      context.globalAlpha = state.opacity / 100;
      const number = labelsShown();
      context.imageSmoothingEnabled = byId("smooth").checked && number < 0;
      if (number >= 0) {
        const image = picture(shape, plane, at, labelPainter(number));
        context.drawImage(image, box.left, box.top, box.w, box.h);
      } else {
        const token = tokenAlong(plane.axis, at);
        const image = picture(grid, plane, token, overlayPainter());
        context.drawImage(
          image, ...tokenRect(box, plane, 0, grid[plane.down] - 1, 0, grid[plane.right] - 1));
      }
      context.restore();
    }
    if (byId("cross").checked) drawCrosshair(context, box, plane);
    if (state.layer === "similarity") drawQuery(context, box, plane);
    drawLetters(context, box, pane);
    drawScaleBar(context, box);
    pane.text.textContent =
      `${pane.name} ${at * factor[plane.axis] + 1} of ${meta.size[plane.axis]}`;
  }

  function drawCrosshair(context, box, plane) {
    const x = edgeX(box, state.at[plane.right] + 0.5);
    const y = edgeY(box, plane, state.at[plane.down] + 0.5);
    const gap = 9 * box.ratio;
    const colorOf = (axis) => Object.values(PLANES).find((other) => other.axis === axis).color;
    context.lineWidth = box.ratio;
    context.globalAlpha = 0.75;
    const line = (color, x0, y0, x1, y1) => {
      context.strokeStyle = color;
      context.beginPath();
      context.moveTo(x0, y0);
      context.lineTo(x1, y1);
      context.stroke();
    };
    line(colorOf(plane.right), x, box.top, x, y - gap);
    line(colorOf(plane.right), x, y + gap, x, box.top + box.h);
    line(colorOf(plane.down), box.left, y, x - gap, y);
    line(colorOf(plane.down), x + gap, y, box.left + box.w, y);
    context.globalAlpha = 1;
  }

  function drawQuery(context, box, plane) {
    if (tokenAlong(plane.axis, state.at[plane.axis]) !== state.query[plane.axis]) return;
    const [down, right] = [state.query[plane.down], state.query[plane.right]];
    context.strokeStyle = "#fff";
    context.lineWidth = 1.5 * box.ratio;
    context.strokeRect(...tokenRect(box, plane, down, down, right, right));
  }

  // The patient's direction toward which an axis of the page grows, or shrinks.
  function letter(axis, isUp) {
    const column = 2 - axis; // affines take x, y, z
    const steps = meta.affine.slice(0, 3).map((row) => row[column]);
    const world = steps.map(Math.abs).indexOf(Math.max(...steps.map(Math.abs)));
    return DIRECTIONS[world][+(steps[world] > 0 === isUp)];
  }

  function drawLetters(context, box, { plane, figure }) {
    const isDownUp = plane.down !== 0;
    const letters = {
      left: letter(plane.right, false),
      right: letter(plane.right, true),
      top: letter(plane.down, !isDownUp),
      bottom: letter(plane.down, isDownUp),
    };
    Object.assign(figure.dataset, letters);
    const inset = 11 * box.ratio;
    const [midX, midY] = [box.paneX / 2, box.paneY / 2];
    const places = {
      left: [Math.max(box.left - inset, inset), midY],
      right: [Math.min(box.left + box.w + inset, box.paneX - inset), midY],
      top: [midX, Math.max(box.top - inset, inset)],
      bottom: [midX, Math.min(box.top + box.h + inset, box.paneY - inset)],
    };
    context.font = `600 ${13 * box.ratio}px system-ui, sans-serif`;
    context.textAlign = "center";
    context.textBaseline = "middle";
    context.lineWidth = 3 * box.ratio;
    for (const [side, [x, y]] of Object.entries(places)) {
      context.strokeStyle = "#000";
      context.strokeText(letters[side], x, y);
      context.fillStyle = "#ffd65a";
      context.fillText(letters[side], x, y);
    }
  }

  function drawScaleBar(context, box) {
    const mm = [200, 100, 50, 20, 10, 5].find((mm) => mm * box.scale < box.paneX / 3) || 5;
    const [x, y] = [box.paneX - 10 * box.ratio, box.paneY - 10 * box.ratio];
    context.fillStyle = "#c3ced9";
    context.fillRect(x - mm * box.scale, y, mm * box.scale, 2 * box.ratio);
    context.font = `${11 * box.ratio}px system-ui, sans-serif`;
    context.textAlign = "right";
    context.textBaseline = "bottom";
    context.fillText(`${mm} mm`, x, y - 2 * box.ratio);
  }

  function drawBar() {
    const range = { attention: meta.attentionRange[state.head], similarity: similarityRange };
    const ends = range[state.layer];
    byId("bar").hidden = !ends;
    if (!ends) return;
    const image = new ImageData(Uint8ClampedArray.from(meta.heat), 256, 1);
    byId("bar").querySelector("canvas").getContext("2d").putImageData(image, 0, 0);
    const unit = state.layer === "attention" ? " x even share" : "";
    const [low, high] = byId("bar").querySelectorAll("span");
    low.textContent = ends[0].toFixed(2);
    high.textContent = `${ends[1].toFixed(2)}${unit}`;
  }

  function show() {
    const here = describe(state.at);
    const rows = [
      ["HU", here.hu],
      ["position, mm", position(here.ras)],
      ["voxel of the file (i, j, k)", here.file.join(", ")],
      ["patch (z, y, x)", here.token.join(", ")],
      ["attention", `${here.attention.toFixed(2)} x even share`],
      ["similarity to the asked patch", here.similarity.toFixed(3)],
      ...here.names,
    ];
    byId("readout").replaceChildren(
      ...rows.map(([name, value]) =>
        element("tr", {}, element("th", { textContent: name }),
          element("td", { textContent: value }))));
    Object.assign(root.dataset, {
      hu: here.hu, ras: here.ras.map((mm) => mm.toFixed(3)).join(","), file: here.file.join(","),
      token: here.token.join(","), attention: here.attention, similarity: here.similarity,
      layer: state.layer, labels: here.names.map(([, name]) => name).join(","),
    });
    for (const [name, unit] of [["level", " HU"], ["width", " HU"], ["opacity", " %"]]) {
      byId(name).value = state[name];
      byId(`${name}-text`).textContent = state[name] + unit;
    }
    byId("head").value = state.head;
    byId("head-label").hidden = state.layer !== "attention";
    for (const button of byId("layers").children) {
      button.setAttribute("aria-pressed", button.value === state.layer);
    }
    for (const button of byId("presets").children) {
      const [level, width] = PRESETS[button.value];
      button.setAttribute("aria-pressed", level === state.level && width === state.width);
    }
    drawBar();
    const grey = huColor();
    panes.forEach((pane) => {
      if (pane.canvas.clientWidth) draw(pane, grey);
      const { plane, canvas } = pane;
      canvas.setAttribute("aria-label",
        `${pane.name} plane, ${here.hu} HU at ${position(here.ras)} mm`);
    });
    showNames();
    root.dataset.ready = "yes";
    clearTimeout(writing);
    writing = setTimeout(writeAddress, 250);
  }

  function changed() {
    if (isWaiting) return;
    isWaiting = true;
    requestAnimationFrame(() => {
      isWaiting = false;
      show();
    });
  }

  // --- the names of labels; a click goes to the label ---

  let namesOf = -1;
  function showNames() {
    const number = labelsShown();
    byId("names").hidden = number < 0;
    if (number < 0 || number === namesOf) return;
    namesOf = number;
    byId("names").replaceChildren(
      ...meta.labelMaps[number].labels.map((label, i) => {
        const chip = element("i");
        chip.style.background = `rgb(${label.color})`;
        return element("button", { type: "button", onclick: () => goToLabel(number, i + 1) },
          chip, label.name);
      }));
  }

  // To the voxel of the label that is nearest to its centre of mass.
  function goToLabel(number, place) {
    const found = [];
    labels[number].forEach((value, i) => value === place && found.push(i));
    if (!found.length) return; // thinned away
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
    state.at = best;
    changed();
  }

  // --- the address: #z=..&y=..&x=.. (voxel of the scan), layer, window, head, opacity, asked patch ---

  function writeAddress() {
    const [z, y, x] = state.at.map((v, a) =>
      Math.min(v * factor[a] + (factor[a] >> 1), meta.size[a] - 1));
    const preset = Object.keys(PRESETS).find(
      (name) => PRESETS[name][0] === state.level && PRESETS[name][1] === state.width);
    const parts = {
      z, y, x, layer: state.layer, window: preset || `${state.level},${state.width}`,
      head: state.head ? meta.heads[state.head - 1].replace(" ", "-") : "mean",
      opacity: state.opacity, patch: state.query.join(","),
    };
    const text = Object.entries(parts).map(([name, value]) => `${name}=${value}`).join("&");
    history.replaceState(null, "", `#${text}`);
  }

  function readAddress() {
    const parts = new URLSearchParams(location.hash.slice(1));
    const numbers = (name) => {
      const values = (parts.get(name) || "").split(",").map(Number);
      return parts.get(name) && values.every(Number.isFinite) ? values : [];
    };
    const current = state.at.map((v, a) => v * factor[a]);
    state.at = pageVoxel(["z", "y", "x"].map((name, a) => numbers(name)[0] ?? current[a]));
    if (parts.get("layer") in LAYERS) state.layer = parts.get("layer");
    const preset = parts.get("window");
    const [level, width] = preset in PRESETS ? PRESETS[preset] : numbers("window");
    if (width > 0) setWindow(level, width);
    const head = firstHeads.findIndex((name) => name.replace(" ", "-") === parts.get("head"));
    if (head >= 0) state.head = head;
    state.opacity = clamp(numbers("opacity")[0] ?? state.opacity, 0, 100);
    const patch = numbers("patch");
    ask(patch.length === 3
      ? patch.map((t, a) => clamp(Math.round(t), 0, grid[a] - 1))
      : tokenAt(state.at));
    changed();
  }

  function setWindow(level, width) {
    state.level = Math.round(clamp(level, -1000, 3000));
    state.width = Math.round(clamp(width, 1, 4096));
  }

  // --- hands on it ---

  function voxelUnder(pane, event) {
    const { plane } = pane;
    const box = layout(pane);
    const voxel = [...state.at];
    const along = (axis, pixel, start, step) => {
      const index = Math.floor((pixel * box.ratio - start) / step);
      return axis === 0 ? shape[0] - 1 - index : index;
    };
    voxel[plane.right] = along(plane.right, event.offsetX, box.left, box.perRight);
    voxel[plane.down] = along(plane.down, event.offsetY, box.top, box.perDown);
    const isInside = voxel.every((v, a) => v >= 0 && v < shape[a]);
    return [voxel.map((v, a) => clamp(v, 0, shape[a] - 1)), isInside];
  }

  function step(axis, count) {
    state.at[axis] = clamp(state.at[axis] + count, 0, shape[axis] - 1);
    changed();
  }

  function alone(pane) {
    const area = document.querySelector(".panes");
    const isAlone = area.classList.toggle("alone");
    panes.forEach((other) => other.figure.classList.toggle("shown", isAlone && other === pane));
    changed();
  }

  // At once, not in the next frame: a stretched picture must never be seen.
  const resized = new ResizeObserver(show);
  panes.forEach((pane) => {
    const { canvas, plane, pointer } = pane;
    let dragged = null; // where a right drag began, and the window then
    const goTo = (event) => {
      [state.at] = voxelUnder(pane, event);
      ask(tokenAt(state.at));
      changed();
    };
    canvas.addEventListener("pointerdown", (event) => {
      canvas.setPointerCapture(event.pointerId);
      if (event.button === 2) dragged = [event.clientX, event.clientY, state.level, state.width];
      else if (event.button === 0) goTo(event);
    });
    canvas.addEventListener("pointermove", (event) => {
      if (event.buttons & 1) goTo(event);
      if (event.buttons & 2 && dragged) {
        const [x, y, level, width] = dragged;
        setWindow(level + 2 * (event.clientY - y), width + 4 * (event.clientX - x));
        changed();
      }
      const [voxel, isInside] = voxelUnder(pane, event);
      const there = describe(voxel);
      pointer.textContent = isInside ? `${there.hu} HU  ${position(there.ras)} mm` : "";
    });
    canvas.addEventListener("pointerleave", () => (pointer.textContent = ""));
    canvas.addEventListener("contextmenu", (event) => event.preventDefault());
    canvas.addEventListener("dblclick", () => alone(pane));
    canvas.addEventListener("wheel", (event) => {
      event.preventDefault();
      step(plane.axis, event.deltaY > 0 ? -1 : 1);
    }, { passive: false });
    canvas.addEventListener("keydown", (event) => {
      const far = event.shiftKey ? 10 : 1;
      const up = plane.down === 0 ? 1 : -1;
      const moves = {
        ArrowLeft: () => step(plane.right, -far),
        ArrowRight: () => step(plane.right, far),
        ArrowUp: () => step(plane.down, up * far),
        ArrowDown: () => step(plane.down, -up * far),
        PageUp: () => step(plane.axis, far),
        PageDown: () => step(plane.axis, -far),
        Enter: () => {
          ask(tokenAt(state.at));
          changed();
        },
        f: () => alone(pane),
      };
      if (!moves[event.key] || event.ctrlKey || event.metaKey || event.altKey) return;
      event.preventDefault();
      moves[event.key]();
    });
    resized.observe(canvas);
  });

  const choose = (id, names, act) =>
    byId(id).append(...Object.entries(names).map(([value, textContent]) =>
      element("button", {
        type: "button", value, textContent,
        onclick: () => {
          act(value);
          changed();
        },
      })));
  choose("presets", PRESET_NAMES, (name) => setWindow(...PRESETS[name]));
  choose("layers", LAYERS, (name) => (state.layer = name));
  firstHeads.forEach((name, value) =>
    byId("head").append(element("option", { value, textContent: name })));
  for (const name of ["level", "width", "opacity", "head"]) {
    byId(name).addEventListener("input", (event) => {
      state[name] = Number(event.target.value);
      changed();
    });
  }
  for (const name of ["smooth", "cross"]) byId(name).addEventListener("input", changed);
  window.addEventListener("hashchange", readAddress);
  readAddress();
}

main();
