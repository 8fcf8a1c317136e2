"use strict";
// Planes of a scene on canvases: the CT, what lies over it, letters and a scale.

// The axes across a plane, down and right; slices count from the feet, so z is drawn upwards.
const PLANES = {
  axial: { axis: 0, down: 1, right: 2, color: "#f26d6d" },
  coronal: { axis: 1, down: 0, right: 2, color: "#5fc98b" },
  sagittal: { axis: 2, down: 0, right: 1, color: "#e8c14e" },
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

// Returns what draws a pane; `state` says of what, `asked` holds the similarity to a patch.
function makePainter(scene, state, asked) {
  const { meta, hu, pca, labels, inBody, tokenAlong, attentionAt } = scene;
  const { shape, grid, spacing, factor } = meta;

  const huColor = () => {
    const low = state.level - state.width / 2;
    return Uint8ClampedArray.from({ length: 4096 }, (_, i) =>
      Math.floor(clamp(((i - 1024 - low) * 255) / state.width, 0, 255)));
  };

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
      return heatPainter(
        (token) => attentionAt(token, state.head), meta.attentionRange[state.head]);
    }
    return heatPainter((token) => asked.similarity[token], asked.range);
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
      context.imageSmoothingEnabled = state.isSmooth && number < 0;
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
    if (state.hasCross) drawCrosshair(context, box, plane);
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

  return { draw, huColor, layout, labelsShown };
}
