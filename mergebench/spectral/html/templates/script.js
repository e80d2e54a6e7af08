"use strict";
(() => {
  const data = JSON.parse(document.getElementById("details").textContent);
  const dialog = document.getElementById("detail");
  const body = document.getElementById("detail-body");

  // Names come from strangers' files: text nodes and attributes only, never HTML.
  function make(tag, attributes = {}, ...children) {
    const drawn = ["svg", "g", "line", "polyline", "circle", "text", "title"].includes(tag);
    const element = drawn
      ? document.createElementNS("http://www.w3.org/2000/svg", tag)
      : document.createElement(tag);
    for (const [name, value] of Object.entries(attributes)) element.setAttribute(name, value);
    element.append(...children);
    return element;
  }

  // Every tensor: names open, a field filters.
  const every = document.getElementById("every");
  for (const head of every.querySelectorAll("th[data-t]")) {
    const button = make("button", { type: "button", class: "open" }, head.textContent);
    head.replaceChildren(button);
    button.addEventListener("click", () => open([Number(head.dataset.t)]));
  }
  const filter = document.getElementById("filter");
  filter.addEventListener("input", () => {
    const wanted = filter.value.toLowerCase();
    let count = 0;
    for (const row of every.tBodies[0].rows) {
      row.hidden = !row.cells[0].textContent.toLowerCase().includes(wanted);
      count += !row.hidden;
    }
    document.getElementById("found").textContent = wanted ? `${count} rows` : "";
  });

  // Maps: a click or Enter opens a cell, arrow keys move; one cell of a map is in the tab order.
  const places = new Map();
  data.items.forEach((item, number) => {
    const key = `${item.l} ${item.c}`;
    if (!places.has(key)) places.set(key, []);
    places.get(key).push(number);
  });
  const moves = { ArrowUp: [-1, 0], ArrowDown: [1, 0], ArrowLeft: [0, -1], ArrowRight: [0, 1] };
  function openCell(cell) {
    const found = places.get(`${cell.parentNode.sectionRowIndex} ${cell.cellIndex - 1}`);
    if (found) open(found);
  }
  for (const map of document.querySelectorAll("table.map[data-model]")) {
    map.setAttribute("role", "grid");
    map.setAttribute("aria-label", map.parentNode.getAttribute("aria-label"));
    const rows = [...map.tBodies[0].rows];
    if (rows.length && rows[0].cells.length > 1) rows[0].cells[1].tabIndex = 0;
    map.addEventListener("click", (event) => {
      const cell = event.target.closest("td");
      if (cell) openCell(cell);
    });
    map.addEventListener("keydown", (event) => {
      const cell = event.target.closest("td");
      if (!cell) return;
      if (event.key === "Enter" || event.key === " ") {
        event.preventDefault();
        openCell(cell);
      } else if (moves[event.key]) {
        event.preventDefault();
        const [down, right] = moves[event.key];
        const next = rows[cell.parentNode.sectionRowIndex + down]?.cells[cell.cellIndex + right];
        if (!next || next.tagName !== "TD") return;
        cell.tabIndex = -1;
        next.tabIndex = 0;
        next.focus();
      }
    });
  }

  // The drill-down.
  document.getElementById("close").addEventListener("click", () => dialog.close());
  function open(numbers, chosen = numbers[0]) {
    const item = data.items[chosen];
    document.getElementById("detail-title").textContent = item.n;
    body.replaceChildren();
    if (numbers.length > 1) {
      const select = make("select", { id: "which" });
      for (const each of numbers) {
        const option = make("option", { value: each }, data.items[each].n);
        option.selected = each === chosen;
        select.append(option);
      }
      select.addEventListener("change", () => {
        open(numbers, Number(select.value));
        document.getElementById("which").focus();
      });
      body.append(make("p", {}, make("label", { for: "which" }, `${numbers.length} matrices in this cell: `), select));
    }
    const norm = item.w === "–" ? "" : `; ‖W0‖ = ${item.w}`;
    body.append(make("p", {}, `${item.s}${norm}; ${item.m.map((each) => `‖ΔW‖ = ${each.d} in ${data.labels[each.i]}${each.x === "changed" ? "" : ` (${each.x})`}`).join(", ")}`));
    const lines = curves(item);
    if (lines.length) body.append(make("h3", {}, "Singular values"), ...chart(item, lines));
    body.append(...numbersOf(item), ...pairsOf(item));
    for (const each of item.m) if (each.u) body.append(...directionsOf(each));
    if (!dialog.open) dialog.showModal();
    dialog.scrollTop = 0;
  }

  function table(caption, heads, rows) {
    const head = make("tr");
    heads.forEach((text, column) => head.append(make("th", { scope: "col", class: column ? "n" : "" }, text)));
    const lines = rows.map(([first, ...rest]) => make("tr", {},
      make("th", { scope: "row" }, String(first)),
      ...rest.map((text) => make("td", { class: "n" }, String(text)))));
    const box = make("div", { class: "scroll", tabindex: "0", role: "region", "aria-label": caption });
    box.append(make("table", { class: "list" }, make("caption", {}, caption), make("thead", {}, head), make("tbody", {}, ...lines)));
    return box;
  }

  function numbersOf(item) {
    const rows = [];
    for (const [name, heads] of Object.entries(data.heads)) {
      heads.forEach((head, place) => {
        const texts = item.m.map((each) => each.v[name]?.[place] ?? "–");
        const together = item.t?.[name]?.[place];
        if (texts.some((text) => text !== "–")) rows.push([`${name}: ${head}`, ...texts]);
        else if (together) rows.push([`${name}: ${head} (together)`, together, ...texts.slice(1).map(() => "")]);
      });
    }
    return rows.length ? [table("Numbers", ["", ...item.m.map((each) => data.labels[each.i])], rows)] : [];
  }

  function pairsOf(item) {
    const rows = item.p.map(([one, other, texts]) => [`${data.labels[one]} – ${data.labels[other]}`, ...texts]);
    return rows.length ? [table("Between models", ["models", ...data.pairs], rows)] : [];
  }

  function directionsOf(model) {
    const rows = model.u.map(([place, sigma, cosine, bound, gap, below]) =>
      [place, sigma, bound ? `${cosine} to ${bound}` : cosine, bound ? "certified" : "exact", gap || "–", below ? `below ${below}` : ""]);
    return [table(`Leading directions of ${data.labels[model.i]}`, ["place", "σ", "largest |cos| with W0", "status", "gap", "intruder"], rows)];
  }

  function curves(item) {
    const found = [];
    const add = (name, held, kind) => {
      if (!held) return;
      const at = data.grids[held[0]];
      const top = held[1][0];
      const points = held[1].map((sigma, place) => [at[place], sigma]).filter(([, sigma]) => sigma > top * 2 ** -20);
      if (points.length) found.push({ name, points, kind });
    };
    add("W0", item.b, "s-ink d0");
    item.m.slice(0, 6).forEach((each) => {
      const color = `s-s${each.i % 6} d${(each.i % 6) + 1}`;
      add(`ΔW of ${data.labels[each.i]}`, each.k.delta, color);
      add(`W of ${data.labels[each.i]}`, each.k.tuned, `s-s${each.i % 6} weak`);
    });
    return found;
  }

  function ticks(low, high) {
    const found = [];
    for (let power = Math.floor(low); power <= Math.ceil(high); power += 1) {
      for (const step of high - low > 1.5 ? [1] : [1, 2, 5]) {
        const at = power + Math.log10(step);
        if (at >= low - 1e-9 && at <= high + 1e-9) found.push([at, Number((step * 10 ** power).toPrecision(1))]);
      }
    }
    const skip = Math.ceil(found.length / 7);
    return found.filter((_, place) => place % skip === 0);
  }

  function chart(item, lines) {
    const all = lines.flatMap((line) => line.points).map(([x, y]) => [Math.log10(x), Math.log10(y)]);
    const [width, height, left, bottom] = [420, 240, 52, 34];
    const right = Math.max(...all.map(([x]) => x), 0.1);
    let low = Math.min(...all.map(([, y]) => y));
    let high = Math.max(...all.map(([, y]) => y));
    const room = Math.max((high - low) * 0.05, 0.05);
    low -= room;
    high += room;
    const x = (at) => left + (at / right) * (width - left - 8);
    const y = (at) => height - bottom - ((at - low) / (high - low)) * (height - bottom - 8);
    const words = lines.map((line) => `${line.name} from ${line.points[0][1]} to ${line.points.at(-1)[1]} at place ${line.points.at(-1)[0]}`).join("; ");
    const svg = make("svg", { class: "chart", viewBox: `0 0 ${width} ${height}`, role: "img", "aria-label": `Singular values by place, both logarithmic: ${words}` });
    for (const [at, text] of ticks(0, right)) {
      svg.append(make("line", { class: "s-grid", x1: x(at), x2: x(at), y1: 8, y2: height - bottom }));
      svg.append(make("text", { x: x(at), y: height - bottom + 14, "font-size": 11, "text-anchor": "middle" }, String(text)));
    }
    for (const [at, text] of ticks(low, high)) {
      svg.append(make("line", { class: "s-grid", x1: left, x2: width - 8, y1: y(at), y2: y(at) }));
      svg.append(make("text", { x: left - 5, y: y(at) + 4, "font-size": 11, "text-anchor": "end" }, String(text)));
    }
    svg.append(make("text", { x: (width + left) / 2, y: height - 3, "font-size": 11, "text-anchor": "middle" }, "place"));
    svg.append(make("text", { x: 10, y: (height - bottom) / 2, "font-size": 12, "text-anchor": "middle" }, "σ"));
    const legend = make("ul", { class: "legend" });
    for (const { name, points, kind } of lines) {
      const at = points.map(([one, other]) => `${x(Math.log10(one)).toFixed(1)},${y(Math.log10(other)).toFixed(1)}`);
      if (points.length > 1) svg.append(make("polyline", { class: `line ${kind}`, points: at.join(" ") }));
      else svg.append(make("circle", { class: kind, cx: at[0].split(",")[0], cy: at[0].split(",")[1], r: 3 }));
      const sample = make("svg", { viewBox: "0 0 36 10", "aria-hidden": "true" }, make("line", { class: `line ${kind}`, x1: 0, x2: 36, y1: 5, y2: 5 }));
      legend.append(make("li", {}, sample, name));
    }
    return [svg, legend];
  }
})();
