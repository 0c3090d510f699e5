"use strict";
(() => {
  const DASHES = [[], [7, 4], [2, 3], [9, 4, 2, 4]];
  const HEIGHT = 224;
  const FONT = '12px system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", Arial, "Liberation Sans", sans-serif';
  const root = document.documentElement;
  let data, plots = [], stop = null, timer = null, last = [];

  const css = (name) => getComputedStyle(root).getPropertyValue(`--${name}`).trim();
  const number = (v, places) => (Number(v.toFixed(places)) + 0) // no minus before a zero
    .toLocaleString("en", { minimumFractionDigits: places, maximumFractionDigits: places }).replace("-", "−");
  const place = (chart, x) => chart.x === "timestep" ? `t = ${1000 - x}`
    : chart.x === "iteration" ? `iteration ${x.toLocaleString("en")}` : `${x.toLocaleString("en")} ${chart.x}`;

  function lines(chart) {
    const series = [{}], columns = [chart.xs], bands = [];
    for (const line of chart.lines) {
      const stroke = css(line.colour);
      const common = { spanGaps: true, points: { show: false } };
      if (chart.stepped) common.paths = uPlot.paths.stepped({ align: 1 });
      if (line.low) {
        bands.push({ series: [series.length, series.length + 1], fill: `${stroke}30` });
        series.push({ ...common, stroke: "transparent", width: 0 }, { ...common, stroke: "transparent", width: 0 });
        columns.push(line.high, line.low);
      }
      const few = chart.xs.length <= 12 && !chart.stepped;
      series.push({ ...common, stroke, width: 2.25, dash: DASHES[line.dash % DASHES.length],
        points: { show: few, size: 6, width: 2, stroke, fill: css("paper") }, main: true });
      columns.push(line.values);
    }
    return { series, columns, bands };
  }

  // uPlot's round steps, and the end: where the last of them would touch it, it goes
  function ticks(chart, low, high, step) {
    const end = chart.xs[chart.xs.length - 1], found = [];
    for (let at = Math.ceil(low / step) * step; at < end - 0.8 * step; at += step) found.push(at);
    return [...found, end];
  }

  // the values of a line of steps, or of many the first and the last
  function course(values) {
    const found = values.filter((value, k) => k === 0 || value !== values[k - 1]);
    return found.length > 3 ? [found[0], found[found.length - 1]] : found;
  }

  function axes(chart) {
    const common = { stroke: css("muted"), font: FONT, ticks: { show: false }, border: { show: false } };
    const steps = chart.x === "timestep" ? (u, splits) => splits.map((v) => String(1000 - v))
      : (u, splits) => splits.map((v) => Number.isInteger(v) ? v.toLocaleString("en") : "");
    const label = { "timestep": "t, from noise to image" }[chart.x] || chart.x;
    return [
      { ...common, grid: { show: false }, values: steps, label,
        splits: (u, axis, low, high, step) => ticks(chart, low, high, step), labelFont: FONT, labelSize: 18, size: 28, space: 56 },
      { ...common, grid: { stroke: css("rule"), width: 1 }, size: 52, space: 34,
        values: (u, splits) => splits.map((v) => String(Number(v.toPrecision(6))).replace("-", "−")) },
    ];
  }

  function rule(u, from, to, colour, dash) {
    const { ctx } = u, scale = devicePixelRatio;
    ctx.save();
    ctx.strokeStyle = colour;
    ctx.lineWidth = scale;
    ctx.setLineDash(dash.map((d) => d * scale));
    ctx.beginPath();
    ctx.moveTo(...from);
    ctx.lineTo(...to);
    ctx.stroke();
    ctx.restore();
  }

  function marks(chart) {
    return (u) => {
      const { left, top, width, height } = u.bbox;
      if (chart.zero) {
        const y = u.valToPos(0, "y", true);
        if (y >= top && y <= top + height) rule(u, [left, y], [left + width, y], css("muted"), []);
      }
      if (chart.mark && chart.mark[0] < u.scales.x.max) {
        const x = u.valToPos(chart.mark[0], "x", true), { ctx } = u;
        rule(u, [x, top], [x, top + height], css("muted"), [1, 3]);
        ctx.save();
        ctx.font = FONT.replace("12px", `${11 * devicePixelRatio}px`);
        ctx.fillStyle = css("muted");
        ctx.textAlign = "right";
        ctx.fillText(chart.mark[1], x - 5 * devicePixelRatio, top + height - 6 * devicePixelRatio);
        ctx.restore();
      }
      if (stop && chart.x === "queries") {
        const x = u.valToPos(stop.queries, "x", true);
        if (x >= left - 1 && x <= left + width + 1) rule(u, [x, top], [x, top + height], css("muted"), [3, 3]);
      }
    };
  }

  function read(figure, chart, index, hovered) {
    const texts = [], whole = chart.stepped && !hovered;
    chart.lines.forEach((line, k) => {
      let at = index;
      while (at > 0 && line.values[at] === null) at -= 1;
      const value = line.values[at], high = line.high ? line.high[at] : null;
      let text = value === null ? "–" : number(value, chart.places);
      if (value !== null && high !== null) text += ` ± ${number(high - value, chart.places)}`;
      if (whole) text = course(line.values).map((one) => number(one, chart.places)).join(" → ");
      if (value !== null) text += chart.unit;
      figure.querySelector(`[data-line="${k}"]`).textContent = text;
      texts.push(`${line.label} ${text}`);
    });
    const where = whole ? "from t = 1000 to 0" : place(chart, chart.xs[index]);
    const when = hovered || chart.xs.length === 1 ? `at ${where}` : `at the end, ${where}`;
    figure.querySelector(".at").textContent = whole ? where : when;
    const plot = figure.querySelector(".plot");
    plot.setAttribute("aria-valuenow", index);
    plot.setAttribute("aria-valuetext", `${where}: ${texts.join("; ")}`);
  }

  function draw(figure, chart) {
    const box = figure.querySelector(".plot"), end = chart.xs.length - 1;
    const { series, columns, bands } = lines(chart);
    const pad = (u, low, high) => low === high ? [low - 1, high + 1] : [low, high];
    const room = (u, low, high) => {
      if (low === null) return [0, 1];
      const ends = [low, high, ...(chart.limits || []), ...(chart.zero ? [0] : [])];
      return uPlot.rangeNum(Math.min(...ends), Math.max(...ends), 0.1, true);
    };
    const u = new uPlot({
      width: Math.max(box.clientWidth, 160), height: HEIGHT, series, bands, axes: axes(chart),
      padding: [8, 22, 0, 0], legend: { show: false }, scales: { x: { time: false, range: pad }, y: { range: room } },
      cursor: { drag: { x: false, y: false, setScale: false }, sync: { key: chart.x, scales: ["x", null] },
        points: { show: (self, k) => self.series[k].main ? undefined : false } },
      hooks: { draw: [marks(chart), ({ scales: { y } }) => {
        figure.querySelector(".cut").hidden = y.min <= 0 && y.max >= 0;
      }],
        setCursor: [(self) => {
          const index = self.cursor.idx;
          read(figure, chart, index === null || index === undefined ? end : index, index !== null && index !== undefined);
        }] },
    }, columns, box);
    u.root.setAttribute("aria-hidden", "true");
    read(figure, chart, end, false);
    return { u, box, chart };
  }

  function keys({ u, box, chart }) {
    const end = chart.xs.length - 1;
    const moves = { ArrowLeft: (k) => k - 1, ArrowDown: (k) => k - 1, ArrowRight: (k) => k + 1, ArrowUp: (k) => k + 1,
      Home: () => 0, End: () => end, PageUp: (k) => k + 10, PageDown: (k) => k - 10 };
    box.onkeydown = (event) => {
      const move = moves[event.key];
      if (!move) return;
      event.preventDefault();
      const next = Math.min(end, Math.max(0, move(Number(box.getAttribute("aria-valuenow")))));
      u.setCursor({ left: u.valToPos(chart.xs[next], "x"), top: 10 });
    };
    box.onblur = () => u.setCursor({ left: -10, top: -10 });
  }

  const resized = new ResizeObserver((entries) => {
    for (const { target, contentRect } of entries) {
      const plot = plots.find(({ box }) => box === target);
      if (plot && contentRect.width > 0 && Math.abs(plot.u.width - contentRect.width) >= 1) {
        plot.u.setSize({ width: contentRect.width, height: HEIGHT });
      }
    }
  });

  function drawAll() {
    resized.disconnect();
    for (const { u } of plots) u.destroy();
    plots = [];
    for (const chart of data.charts) {
      const figure = document.querySelector(`[data-chart="${chart.key}"]`);
      if (figure) plots.push(draw(figure, chart));
    }
    for (const plot of plots) {
      keys(plot);
      resized.observe(plot.box);
    }
  }

  function show(index) {
    const slider = document.getElementById("moment"), caption = document.getElementById("caption");
    stop = data.film.stops[index];
    const title = document.createElement("b");
    title.textContent = stop.label;
    caption.replaceChildren(title);
    for (const score of stop.scores) {
      const span = document.createElement("span");
      span.textContent = score;
      caption.append(" ", span);
    }
    if (slider) {
      slider.value = String(index);
      slider.setAttribute("aria-valuetext", stop.label);
    }
    for (const image of document.querySelectorAll("img[data-reel]")) {
      const reel = Number(image.dataset.reel), tile = Number(image.dataset.tile);
      const moment = data.film.reels[reel][stop.shown[reel]];
      const source = moment ? moment[tile] : last[reel][tile];
      if (image.src !== source) image.src = source;
      image.alt = `${image.dataset.alt}, ${stop.label}`;
    }
    for (const { u, chart } of plots) if (chart.x === "queries") u.redraw(false, false);
  }

  function pause() {
    clearInterval(timer);
    timer = null;
    const button = document.getElementById("play");
    if (!button) return;
    button.textContent = "Play";
    button.setAttribute("aria-pressed", "false");
  }

  function play(slider, button) {
    const end = data.film.stops.length - 1;
    if (Number(slider.value) === end) show(0);
    button.textContent = "Pause";
    button.setAttribute("aria-pressed", "true");
    timer = setInterval(() => {
      show(Math.min(end, Number(slider.value) + 1));
      if (Number(slider.value) === end) pause();
    }, Math.max(120, Math.min(600, 6000 / end)));
  }

  function startFilm(index) {
    stop = null;
    if (!data.film) return;
    last = data.film.reels.map(() => []);
    for (const image of document.querySelectorAll("img[data-reel]")) {
      last[Number(image.dataset.reel)][Number(image.dataset.tile)] = image.src;
    }
    const slider = document.getElementById("moment"), button = document.getElementById("play");
    const end = data.film.stops.length - 1;
    if (slider) {
      slider.oninput = () => { pause(); show(Number(slider.value)); };
      button.onclick = () => timer ? pause() : play(slider, button);
      slider.value = String(end);
    }
    if (index !== undefined && index < end) show(index);
  }

  function start(index) {
    data = JSON.parse(document.getElementById("data").textContent);
    startFilm(index);
    drawAll();
  }

  const reachable = () => [...document.querySelectorAll("main input, main button, main summary, main [tabindex='0']")];

  function replace(page) {
    const slider = document.getElementById("moment"), focus = reachable().indexOf(document.activeElement);
    const behind = slider && Number(slider.value) < Number(slider.max) ? Number(slider.value) : undefined;
    const open = [...document.querySelectorAll("details")].map((one) => one.open);
    const y = scrollY;
    pause();
    document.getElementById("main").replaceWith(document.adoptNode(page.getElementById("main")));
    document.getElementById("data").textContent = page.getElementById("data").textContent;
    document.title = page.title;
    document.querySelectorAll("details").forEach((one, k) => { one.open = open[k] === true; });
    start(behind);
    const again = reachable()[focus];
    if (again) again.focus({ preventScroll: true });
    scrollTo({ top: y, behavior: "instant" });
  }

  async function follow(etag, seconds) {
    const live = document.getElementById("live");
    let next = etag;
    try {
      const answer = document.hidden ? null : await fetch(location.pathname, { cache: "no-store", headers: { "If-None-Match": etag } });
      if (answer && answer.status === 200) {
        next = answer.headers.get("ETag");
        replace(new DOMParser().parseFromString(await answer.text(), "text/html"));
      }
      if (answer) live.textContent = "Following the run";
    } catch {
      live.textContent = "The server has ended; this page stays as it is";
    }
    setTimeout(follow, seconds * 1000, next, seconds);
  }

  start();
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", drawAll);
  addEventListener("beforeprint", () => { root.classList.add("printing"); drawAll(); });
  addEventListener("afterprint", () => { root.classList.remove("printing"); drawAll(); });
  const { etag, refresh } = document.body.dataset;
  if (etag) setTimeout(follow, Number(refresh) * 1000, etag, Number(refresh));
})();
