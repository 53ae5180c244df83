// The plots of a report: panels of uPlot over one axis of steps. What comes from the
// log is only ever set as text, or drawn.
"use strict";
(async () => {
  if (!window.DecompressionStream) return; // the still pictures stay
  const make = (tag, parent, text = "", attributes = {}) => {
    const element = document.createElement(tag);
    element.textContent = text;
    for (const name in attributes) element.setAttribute(name, attributes[name]);
    return parent.appendChild(element);
  };
  const at = (id) => document.getElementById(id);
  const color = (name) =>
    getComputedStyle(document.documentElement).getPropertyValue(name).trim();
  const DASHES = [[], [8, 4], [2, 3], [8, 3, 2, 3], [14, 4], [4, 6]];
  const KINDS = { f: Float32Array, u: Uint32Array };

  async function unpack(run) {
    const packed = Uint8Array.from(atob(run.bytes), (c) => c.charCodeAt(0));
    const stream = new Blob([packed]).stream();
    const plain = stream.pipeThrough(new DecompressionStream("deflate"));
    const planes = new Uint8Array(await new Response(plain).arrayBuffer());
    const n = run.rows;
    let start = 0;
    for (const [name, kind] of run.columns) {
      const bytes = new Uint8Array(4 * n);
      for (let plane = 0; plane < 4; plane++)
        for (let i = 0; i < n; i++) bytes[4 * i + plane] = planes[start + plane * n + i];
      run[name] = new KINDS[kind](bytes.buffer);
      start += 4 * n;
    }
    return run;
  }

  const { runs, refresh } = JSON.parse(at("payload").textContent);
  await Promise.all(runs.map(unpack));
  const first = runs.reduce((a, r) => (BigInt(r.first) < a ? BigInt(r.first) : a),
    BigInt(runs[0].first));
  for (const run of runs) {
    run.shift = Number(BigInt(run.first) - first);
    run.x = Float64Array.from(run.at, (x) => x + run.shift);
  }
  const alone = runs.length === 1;
  // If no step was changed, scale and shares are straight lines.
  const acted = runs.some((run) => run.acted);
  const end = Math.max(...runs.map((run) => run.x[run.rows - 1]));
  const whole = [0, Math.max(end, 1)];
  const LEAVES = "norm by parameter";
  let view = whole, plots = [], here = null;
  // Names of lines that are not drawn: at first the parameters after the eighth.
  const hidden = new Set(runs[0].leaves.slice(8).map((name) => `${LEAVES} ${name}`));
  const set = { logNorm: true, logLoss: runs.some((r) => r.logLoss), smooth: 0 };

  // -- numbers as the rest of the page writes them
  function number(v) {
    if (Number.isNaN(v)) return "NaN";
    if (!Number.isFinite(v)) return v > 0 ? "infinite" : "-infinite";
    const size = Math.abs(v);
    if (size && !(size >= 1e-3 && size < 1e6)) return v.toExponential(2);
    return size >= 1000 ? Math.round(v).toLocaleString("en") : `${+v.toPrecision(3)}`;
  }
  const stepName = (x) => String(first + BigInt(Math.round(x)));

  // The row of a run that is nearest to a step; the last that is not after it.
  function before(run, x) {
    let low = 0, high = run.rows;
    while (low < high) {
      const middle = (low + high) >> 1;
      if (run.x[middle] <= x) low = middle + 1;
      else high = middle;
    }
    return low - 1;
  }
  function nearest(run, x) {
    const i = Math.max(before(run, x), 0);
    return i + 1 < run.rows && run.x[i + 1] - x < x - run.x[i] ? i + 1 : i;
  }

  // -- what is drawn
  // The values between two gaps, of which a line shows nothing.
  function isolated(u, s, show) {
    const values = u.data[s], [from, to] = u.series[0].idxs, out = [];
    for (let i = from; i <= to && !show; i++)
      if (typeof values[i] === "number" && (i === 0 || values[i - 1] === null)
        && (i + 1 === values.length || values[i + 1] === null)) out.push(i);
    return show ? null : out;
  }

  const drawable = (values, log) =>
    Array.from(values, (v) => (Number.isFinite(v) && (!log || v > 0) ? v : null));

  // The median of the rows within so many steps, at no more than 1,500 places.
  function smoothed(run, values) {
    const every = Math.ceil(run.rows / 1500), out = new Array(run.rows).fill(null);
    for (let i = 0; i < run.rows; i += every) {
      const from = before(run, run.x[i] - set.smooth / 2) + 1;
      const near = values.slice(from, before(run, run.x[i] + set.smooth / 2) + 1);
      const known = near.filter((v) => v !== null).sort((a, b) => a - b);
      if (known.length) out[i] = known[(known.length - 1) >> 1];
    }
    return out;
  }

  // The share of flagged steps in each hundredth of what is seen, of 20 steps or more;
  // in each tenth of a short run.
  function shares(run, counts) {
    const last = run.steps, [from, to] = view;
    const lows = Math.max(before(run, from), 0), highs = before(run, to);
    const rows = highs > lows ? run.row[highs] - run.row[lows] : 0;
    const parts = Math.max(Math.min(10, rows), Math.min(100, Math.floor(rows / 20)));
    const points = [[], []];
    for (let k = 0; k < parts && rows; k++) {
      const a = Math.max(before(run, from + ((to - from) * k) / parts), 0);
      const b = Math.max(before(run, from + ((to - from) * (k + 1)) / parts), 0);
      const of = run.row[b] - run.row[a];
      if (!of || run.row[a] >= last) continue;
      points[0].push((run.x[a] + run.x[b]) / 2);
      points[1].push((counts[b] - counts[a]) / of);
    }
    return points;
  }

  // A panel has lines; a line has its own x, and uPlot.join brings them together.
  function panels() {
    const lines = (quantity, log, own = {}) => runs.flatMap((run, r) => {
      const label = alone ? own.label || quantity : run.name;
      const look = alone ? own : { hue: r % 8, dash: r % 6 };
      const values = drawable(run[quantity], log), soft = set.smooth && !own.rough;
      const raw = { label, x: run.x, values, ...look, faint: soft };
      const smooth = { ...raw, values: soft && smoothed(run, values), faint: false,
        label: `${alone ? "" : `${label}, `}median of ${set.smooth} steps`, spans: true };
      return soft ? [raw, smooth] : [raw];
    });
    const share = (counts, label, look) => runs.map((run, r) => {
      const [x, values] = shares(run, run[counts]);
      return alone ? { label, x, values, width: 2, ...look }
        : { label: run.name, x, values, hue: r % 8, dash: r % 6 };
    });
    const bound = { label: "threshold", hue: 6, dash: 1, width: 2, rough: true };
    const norm = lines("norm", set.logNorm, { label: "norm before clipping", hue: 0 });
    const list = [];
    const drawn = (line) => line.values.some((v) => v !== null);
    const add = (title, all, more = {}) => list.push({ title, height: 120, ...more,
      lines: more.again || !all.some(drawn) ? all : all.filter(drawn) });
    if (alone) {
      const [run] = runs;
      const clipped = norm[0].values.map((v, i) => (run.action[i] & 1 ? v : null));
      norm.push({ label: "clipped step", x: run.x, values: clipped, hue: 4, dots: true });
      norm.push(...lines("threshold", set.logNorm, bound));
    }
    add("gradient norm", norm, { log: set.logNorm, height: 240, bands: true });
    if (!alone) add("threshold", lines("threshold", set.logNorm), { log: set.logNorm });
    if (acted) add("scale (what the clip multiplied the norm by)",
      lines("scale", false, { label: "scale", hue: 0, rough: true }), { most: 1 });
    const skips = runs[0].bands.skipped.length && alone;
    const again = () => [
      ...share("clippedBefore", "clipped", { hue: 4 }),
      ...(skips ? share("skippedBefore", "skipped", { hue: 1, dash: 2 }) : []),
    ];
    if (acted) add(alone ? "share of steps" : "share of clipped steps", again(),
      { percent: true, again });
    if (runs.some((run) => run.loss.some(Number.isFinite)))
      add("loss", lines("loss", set.logLoss, { label: "loss", hue: 2 }),
        { log: set.logLoss, height: 180 });
    if (alone && runs[0].leaves.length)
      add(LEAVES, runs[0].leaves.map((label, i) => ({
        label: label || "-", x: runs[0].x, hue: i % 8, dash: (i + (i >> 3)) % 6,
        values: drawable(runs[0][`leaf${i}`], set.logNorm), key: `leaf${i}`,
      })), { log: set.logNorm, height: 260 });
    return list;
  }

  // Of one run over the whole height; of several each has a lane along the top.
  function band(u) {
    const { ctx, bbox } = u, right = bbox.left + bbox.width, lane = 6 * devicePixelRatio;
    runs.forEach((run, r) => Object.entries(run.bands).forEach(([kind, spans]) => {
      const top = bbox.top + (alone ? 0 : r * lane);
      const height = alone ? bbox.height : lane - 2, stripe = kind === "reached";
      ctx.fillStyle = color(alone ? (stripe ? "--bad" : "--band") : `--c${r % 8}`);
      for (const [a, b] of spans) {
        const from = u.valToPos(a + run.shift - 0.5, "x", true);
        const to = Math.max(u.valToPos(b + run.shift + 0.5, "x", true), from + 2);
        if (to < bbox.left || from > right) continue;
        const left = Math.max(from, bbox.left), width = Math.min(to, right) - left;
        if (!stripe || !alone) ctx.fillRect(left, top, width, height);
        else for (let y = 0; y < height; y += 8) ctx.fillRect(left, top + y, width, 2);
      }
    }));
  }

  // 1, 2 and 5 of each power of ten, or powers alone where there are many; and round
  // numbers at equal distances where all of it is within one of these steps.
  function decades(u, axis, low, high) {
    const from = Math.floor(Math.log10(low)), to = Math.ceil(Math.log10(high));
    const by = Math.max(Math.ceil((to - from) / 6), 1), out = [];
    for (let power = from; power <= to; power += by)
      for (const digit of to - from > 2 ? [1] : [1, 2, 5]) out.push(digit * 10 ** power);
    const inside = out.filter((v) => v >= low && v <= high);
    return inside.length > 1 ? inside : evenly(low, high);
  }

  function evenly(low, high) {
    const power = 10 ** Math.floor(Math.log10((high - low) / 4));
    const by = [1, 2, 5, 10].map((d) => d * power).find((d) => (high - low) / d <= 5);
    const from = Math.ceil(low / by), count = Math.floor(high / by) - from + 1;
    return Array.from({ length: count }, (_, i) => +((from + i) * by).toPrecision(12));
  }

  const joined = (lines) => uPlot.join(lines.map((line) => [line.x, line.values]));

  function draw(panel, place) {
    const box = make("div", place, "", { class: "panel" });
    const legend = make("div", box, "", { class: "legend" });
    make("strong", legend, panel.title);
    const series = panel.lines.map((line, i) => ({
      show: !hidden.has(`${panel.title} ${line.label}`), spanGaps: !!line.spans,
      stroke: () => color(`--c${line.hue}`) + (line.faint ? "66" : ""),
      width: line.width || (line.spans ? 2.2 : 1.2), dash: DASHES[line.dash || 0],
      ...(line.dots && { paths: () => null, points: { show: true, size: 4,
        fill: () => color(`--c${line.hue}`), width: 0 } }),
      ...(!line.dots && { points: { show: (u, s, from, to) => to - from < 100, size: 4,
        ...(!line.spans && { filter: isolated }), fill: () => color(`--c${line.hue}`) } }),
    }));
    const axis = () => ({ stroke: () => color("--soft"), ticks: { show: false },
      grid: { stroke: () => color("--line"), width: 1 }, font: "12px system-ui" });
    const label = (v) => v === null || v === undefined ? ""
      : panel.percent ? `${+(100 * v).toPrecision(3)}%`
        : number(v).replace(/\.00e\+?/, "e");
    const least = (u, low, high) => low === null ? [0.1, 1]
      : panel.log ? [low / 1.15, high * 1.15]
        : panel.most || panel.percent ? [0, Math.max(high, panel.most || 0.01) * 1.05]
          : low === high ? [low - 1, high + 1]
            : [low - 0.05 * (high - low), high + 0.05 * (high - low)];
    const u = new uPlot({
      width: place.clientWidth, height: panel.height, legend: { show: false },
      scales: { x: { time: false, range: () => view },
        y: { distr: panel.log ? 3 : 1, range: least } },
      series: [{}, ...series],
      axes: [{ ...axis(), values: (_, splits) => splits.map((x) =>
        Number.isInteger(x) ? stepName(x) : ""), space: 80, size: 28 },
      { ...axis(), size: 62, values: (_, splits) => splits.map(label),
        ...(panel.log && { splits: decades, filter: (u, splits) => splits }), space: 28 }],
      cursor: { sync: { key: "steps", scales: ["x", null], setSeries: false,
        filters: { pub: (type) => type === "mousemove" || type === "mouseleave" } },
      drag: { x: true, y: false, setScale: false }, y: false,
      focus: { prox: 12 } },
      focus: { alpha: panel.lines.length > 6 ? 0.3 : 1 },
      hooks: {
        drawClear: [band],
        setSelect: [(u) => u.select.width > 4 && zoom(u.posToVal(u.select.left, "x"),
          u.posToVal(u.select.left + u.select.width, "x"))],
        setCursor: [(u) => u.cursor.event && u.cursor.left >= 0 &&
          read(u.posToVal(u.cursor.left, "x"))],
      },
    }, joined(panel.lines), box);
    u.root.setAttribute("role", "img");
    u.root.setAttribute("aria-label", `${panel.title} by step; the readout has its numbers`);
    u.over.addEventListener("dblclick", () => zoom(...whole));
    panel.lines.forEach((line, i) => {
      const shown = series[i].show;
      const button = make("button", legend, "", { type: "button", "aria-pressed": shown });
      const svg = document.createElementNS("http://www.w3.org/2000/svg", "svg");
      svg.setAttribute("viewBox", "0 0 30 8");
      svg.setAttribute("aria-hidden", "true");
      const mark = svg.appendChild(document.createElementNS(svg.namespaceURI, "path"));
      mark.setAttribute("d", line.dots ? "M13 4h4" : "M0 4h30");
      mark.setAttribute("stroke-width", line.dots || line.spans ? 5 : 3);
      mark.setAttribute("stroke-opacity", line.faint ? 0.5 : 1);
      mark.setAttribute("stroke", `var(--c${line.hue})`);
      mark.setAttribute("stroke-dasharray", (DASHES[line.dash || 0]).join(" "));
      button.append(svg, line.label);
      button.addEventListener("click", () => {
        const show = button.getAttribute("aria-pressed") !== "true";
        button.setAttribute("aria-pressed", show);
        hidden[show ? "delete" : "add"](`${panel.title} ${line.label}`);
        u.setSeries(i + 1, { show });
      });
    });
    return { u, panel };
  }

  function build() {
    plots.forEach(({ u }) => u.destroy());
    at("panels").replaceChildren();
    plots = panels().map((panel) => draw(panel, at("panels")));
    // uPlot lays its plots out after this call.
    if (here !== null) Promise.resolve().then(() => point(here));
  }

  // -- what moves it
  function zoom(low, high) {
    const middle = (low + high) / 2, span = Math.max(high - low, 4);
    low = Math.max(middle - span / 2, 0);
    view = [low, Math.min(Math.max(low + span, 1), whole[1])];
    if (view[1] - view[0] < 1) view = whole;
    plots.forEach(({ u, panel }) => u.batch(() => {
      if (panel.again) u.setData(joined(panel.again()), false);
      u.setSelect({ left: 0, width: 0, top: 0, height: 0 }, false);
      u.setScale("x", { min: view[0], max: view[1] });
    }));
    if (here !== null) point(here);  // the line stays at the step that was read
  }

  function read(x) {
    here = Math.max(0, Math.min(Math.round(x), end));
    const lines = runs.map((run) => {
      const [start, last] = [run.x[0], run.x[run.rows - 1]];
      if (here < start) return `${run.name}: starts at step ${stepName(start)}`;
      if (here > last) return `${run.name}: ends at step ${stepName(last)}`;
      const i = nearest(run, here), action = run.action[i];
      if (alone) here = run.x[i];
      const parts = [["norm", run.norm[i]], ["threshold", run.threshold[i]],
        ["scale", run.scale[i]]].map(([name, v]) => `${name} ${number(v)}`);
      const lost = run.loss.some(Number.isFinite) && !Number.isFinite(run.norm[i]);
      if (lost || Number.isFinite(run.loss[i])) parts.push(`loss ${number(run.loss[i])}`);
      parts.push(action & 2 ? "skipped" : action & 1 ? "clipped" : "not clipped");
      if (run.bad[i]) parts.push(`NaN or infinite in ${run.bad[i]}`);
      else if (run.leaders.length) parts.push(
        `largest parameter ${run.leaders[run.leader[i]]} (${number(run.leaderNorm[i])})`);
      return `${alone ? "" : `${run.name}: `}step ${stepName(run.x[i])}: ${parts.join(" · ")}`;
    });
    say(lines.join("\n"));
  }

  // Never lower than before, so that the plots stay where the reader points at them.
  function say(words) {
    const readout = at("readout");
    readout.firstElementChild.textContent = words;
    readout.style.minHeight = `${readout.getBoundingClientRect().height}px`;
  }

  function point(x) {
    read(x);
    plots.forEach(({ u }) => {
      const seen = here >= view[0] && here <= view[1];
      const left = seen ? u.valToPos(here, "x") : -10;
      u.setCursor({ left, top: u.over.clientHeight / 2 }, false, false);
    });
  }

  function goTo(step) {
    const x = Math.max(0, Math.min(Number(BigInt(step) - first), end));
    const around = Math.min(50, end / 2 || 1);
    zoom(x - around, x + around);
    point(x);
  }

  function scaleView(factor) {
    const middle = here !== null && here >= view[0] && here <= view[1]
      ? here : (view[0] + view[1]) / 2;
    zoom(middle - (middle - view[0]) * factor, middle + (view[1] - middle) * factor);
  }
  function move(share) {
    const by = (view[1] - view[0]) * share, span = view[1] - view[0];
    const low = Math.max(0, Math.min(view[0] + by, whole[1] - span));
    zoom(low, low + span);
  }

  // -- controls
  const bar = document.querySelector(".controls");
  const button = (text, label, act) =>
    make("button", bar, text, { type: "button", "aria-label": label, title: label })
      .addEventListener("click", act);
  button("+", "Zoom in", () => scaleView(0.5));
  button("\u2212", "Zoom out", () => scaleView(2));
  button("\u2190", "Earlier steps", () => move(-0.5));
  button("\u2192", "Later steps", () => move(0.5));
  button("All steps", "Show all steps", () => zoom(...whole));
  for (const [key, text] of [["logNorm", "Log norms"], ["logLoss", "Log loss"]]) {
    const box = make("input", make("label", bar), "", { type: "checkbox" });
    box.after(` ${text}`);
    box.checked = set[key];
    box.addEventListener("change", () => { set[key] = box.checked; build(); });
  }
  const wanted = make("input", make("label", bar, "Go to step "), "",
    { type: "text", inputmode: "numeric", size: 8 });
  wanted.addEventListener("keydown", (event) => {
    const digits = wanted.value.replace(/[\s,]/g, ""), good = /^\d+$/.test(digits);
    wanted.setAttribute("aria-invalid", event.key === "Enter" && digits !== "" && !good);
    if (event.key === "Enter" && good) goTo(digits);
  });
  const smooth = make("select", make("label", bar, "Smoothing "));
  for (const steps of [0, 10, 30, 100, 300, 1000])
    if (steps < end) make("option", smooth, steps ? `${steps} steps` : "none", { value: steps });
  smooth.addEventListener("change", () => { set.smooth = +smooth.value; build(); });

  at("panels").addEventListener("keydown", (event) => {
    const far = event.shiftKey ? 10 : 1;
    const act = {
      ArrowLeft: () => step(-far), ArrowRight: () => step(far), "+": () => scaleView(0.5),
      "=": () => scaleView(0.5), "-": () => scaleView(2), 0: () => zoom(...whole),
      Home: () => point(0), End: () => point(end),
    }[event.key];
    if (act && !event.ctrlKey && !event.metaKey && event.target === at("panels")) {
      act();
      event.preventDefault();
    }
  });
  function step(by) {
    // Along the run that goes on the longest.
    const run = runs.reduce((a, b) => (b.x[b.rows - 1] > a.x[a.rows - 1] ? b : a));
    const i = here === null ? 0 : nearest(run, here) + by;
    point(run.x[Math.max(0, Math.min(i, run.rows - 1))]);
    const span = view[1] - view[0];
    if (here < view[0] || here > view[1]) zoom(here - span / 2, here + span / 2);
  }
  document.addEventListener("click", (event) => {
    const link = event.target.closest("a[data-step]");
    if (!link) return;
    event.preventDefault();
    goTo(link.dataset.step);
    at("live").scrollIntoView();
    at("panels").focus({ preventScroll: true });
  });

  // -- notes, of what there is
  const notes = [];
  const kept = runs.filter((run) => run.rows < run.steps);
  if (kept.length) notes.push("Of a long run, the plots hold the steps with the smallest, "
    + "middle and largest norm and loss of every " + Math.ceil(kept[0].steps / 8000)
    + " steps; shares count all steps.");
  const has = (kind) => runs.some((run) => run.bands[kind].length);
  const why = "the norm was NaN or infinite, and the step was not skipped.";
  if (!alone && (has("skipped") || has("reached"))) notes.push(
    "Bars along the top, in the colors of the runs: the step was skipped, or " + why);
  else if (has("skipped")) notes.push("Gray bands: skipped steps.");
  if (alone && has("reached")) notes.push(`Striped bands: ${why}`);
  if (!acted) notes.push("No step was clipped, rescaled or skipped, so the plots of "
    + "the scale and of the shares are left out.");
  notes.push("Click a name above a plot to hide or show its line.");
  if (alone && runs[0].moreLeaves) notes.push(
    `The page holds the ${runs[0].leaves.length} parameters with the largest norms; `
    + `${number(runs[0].moreLeaves)} more are in the log.`);
  at("notes").textContent = notes.join(" ");

  // A page that is written again loads itself again, but not under a reader's hands.
  const zoomed = () => view[1] - view[0] < whole[1] - whole[0];
  if (refresh) setInterval(() => zoomed() || location.reload(), 1000 * refresh);

  at("live").hidden = false;
  document.documentElement.classList.add("live");
  build();
  const hint = at("readout").firstElementChild.textContent;
  read(0);
  here = null;
  say(hint);
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", build);
  new ResizeObserver(() => plots.forEach(({ u, panel }) =>
    u.setSize({ width: at("panels").clientWidth, height: panel.height }))).observe(at("panels"));
})();
