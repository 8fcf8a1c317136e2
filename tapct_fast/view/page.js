"use strict";
// What a person does to the page: controls, address, mouse and keys.

const PRESETS = {
  // centre and width in HU
  lung: [-600, 1500],
  soft: [40, 400],
  bone: [400, 1800],
  brain: [40, 80],
};
const PRESET_NAMES = { lung: "Lung", soft: "Soft tissue", bone: "Bone", brain: "Brain" };

const byId = (id) => document.getElementById(id);

function element(name, properties, ...children) {
  const made = Object.assign(document.createElement(name), properties);
  made.append(...children);
  return made;
}

async function main() {
  const root = byId("viewer");
  const scene = await loadScene();
  const { meta, tokenAt } = scene;
  const { shape, grid, factor } = meta;
  const LAYERS = { ct: "CT only", pca: "Features", attention: "Attention", similarity: "Similarity" };
  meta.labelMaps.forEach((map) => {
    LAYERS[map.title] = map.title[0].toUpperCase() + map.title.slice(1);
  });
  const heads = ["mean", ...meta.heads];
  const state = {
    at: scene.toPage(meta.middle),
    query: null, // a token
    layer: "pca",
    level: PRESETS.soft[0],
    width: PRESETS.soft[1],
    opacity: 60,
    head: 0, // the mean
    isSmooth: false,
    hasCross: true,
  };
  const asked = { similarity: null, range: null }; // of state.query
  const painter = makePainter(scene, state, asked);
  let isWaiting = false;
  let writing = 0;

  function ask(token) {
    state.query = token;
    Object.assign(asked, scene.similarityTo(token));
  }

  const describe = (voxel) => scene.describe(voxel, state.head, asked.similarity);

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

  function drawBar() {
    const range = { attention: meta.attentionRange[state.head], similarity: asked.range };
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
    const grey = painter.huColor();
    panes.forEach((pane) => {
      if (pane.canvas.clientWidth) painter.draw(pane, grey);
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
    const number = painter.labelsShown();
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

  function goToLabel(number, place) {
    state.at = scene.middleOf(number, place) || state.at;
    changed();
  }

  // --- the address: #z=..&y=..&x=.. (voxel of the scan), layer, window, head, opacity, asked patch ---

  function writeAddress() {
    const [z, y, x] = scene.fromPage(state.at);
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
    state.at = scene.toPage(["z", "y", "x"].map((name, a) => numbers(name)[0] ?? current[a]));
    if (parts.get("layer") in LAYERS) state.layer = parts.get("layer");
    const preset = parts.get("window");
    const [level, width] = preset in PRESETS ? PRESETS[preset] : numbers("window");
    if (width > 0) setWindow(level, width);
    const head = heads.findIndex((name) => name.replace(" ", "-") === parts.get("head"));
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
    const box = painter.layout(pane);
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
    let rolled = 0; // pixels of the wheel: a touchpad sends many small ones
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
      rolled += event.deltaMode ? 50 * event.deltaY : event.deltaY;
      if (Math.abs(rolled) < 50) return;
      step(plane.axis, -Math.sign(rolled));
      rolled = 0;
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
        F: () => alone(pane),
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
  heads.forEach((name, value) =>
    byId("head").append(element("option", { value, textContent: name })));
  for (const name of ["level", "width", "opacity", "head"]) {
    byId(name).addEventListener("input", (event) => {
      state[name] = Number(event.target.value);
      changed();
    });
  }
  for (const [id, name] of [["smooth", "isSmooth"], ["cross", "hasCross"]]) {
    byId(id).addEventListener("input", (event) => {
      state[name] = event.target.checked;
      changed();
    });
  }
  window.addEventListener("hashchange", readAddress);
  readAddress();
}

main().catch((error) => {
  const text = "This page could not be shown: it needs a browser of 2023 or later. ";
  byId("viewer").replaceChildren(text, String(error));
  throw error;
});
