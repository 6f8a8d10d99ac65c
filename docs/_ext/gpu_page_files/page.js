"use strict";
(() => {
  const data = JSON.parse(document.getElementById("gpu-data").textContent);
  const form = document.getElementById("gpu-form");
  const answer = document.getElementById("gpu-answer");
  const bars = document.getElementById("gpu-bars");
  const code = document.getElementById("gpu-code");
  const GIB = 1024 ** 3 / 1e9;
  const record = data.phases.length + 1;
  const decoded = new Map();

  function numbers(model, method) {
    const key = `${model}\n${method}`;
    if (!decoded.has(key)) {
      const bytes = Uint8Array.from(atob(data.models[model].values[method]), (c) => c.charCodeAt(0));
      const view = new DataView(bytes.buffer);
      decoded.set(key, Uint16Array.from({ length: bytes.length / 2 }, (_, i) => view.getUint16(2 * i, true)));
    }
    return decoded.get(key);
  }

  // the numbers of a setting in GB: one a phase, then what a card should have; null where there are too many tokens
  function lookup(method, chosen) {
    let index = 0;
    for (const [name, values] of Object.entries(data.axes[method])) {
      index = index * values.length + values.indexOf(chosen[name]);
    }
    const found = numbers(chosen.model, method).slice(index * record, (index + 1) * record);
    if (!found[record - 1]) return null;
    const sizes = Array.from(found, (value) => value / 100);
    return { phases: sizes.slice(0, -1), required: sizes[record - 1] };
  }

  function fill(name, values, label = String) {
    for (const value of values) form.elements[name].add(new Option(label(value), value));
  }

  function read() {
    const field = (name) => form.elements[name];
    const cards = Number(field("cards").value);
    // per-layer updates are made for one process
    field("per_layer").disabled = cards > 1;
    return {
      model: field("model").value,
      card: Number(field("card").value),
      cards,
      sequence_length: Number(field("sequence_length").value),
      batch_size: Number(field("batch_size").value),
      gradient_accumulation_steps: Number(field("gradient_accumulation_steps").value),
      rank: Number(field("rank").value),
      optimizer: field("optimizer").value,
      gradient_checkpointing: field("gradient_checkpointing").checked,
      per_layer: field("per_layer").checked && cards === 1,
    };
  }

  function element(tag, attributes = {}, ...children) {
    const made = Object.assign(document.createElement(tag), attributes);
    made.append(...children);
    return made;
  }

  function showRanks(hidden) {
    for (const option of form.elements.rank.options) option.textContent = `${hidden / option.value} (1/${option.value} of the width)`;
  }

  function show() {
    const chosen = read();
    const { hidden, model } = data.models[chosen.model];
    showRanks(hidden);
    history.replaceState(null, "", `#${new URLSearchParams(Object.entries(chosen).map(([k, v]) => [k, String(v)]))}`);
    const found = Object.keys(data.methods).map((method) => [method, lookup(method, chosen)]);
    bars.replaceChildren();
    if (!found[0][1]) {
      answer.textContent = `A micro-batch of ${chosen.sequence_length * chosen.batch_size} tokens was not computed; loqt estimate does it.`;
      code.hidden = true;
      return;
    }
    const budget = chosen.card * GIB;
    const largest = Math.max(budget, ...found.map(([, sizes]) => Math.max(...sizes.phases, sizes.required)));
    const loqt = found[0][1];
    const ranks = data.axes.loqt.rank.filter((rank) => lookup("loqt", { ...chosen, rank }).required <= budget);
    const tokens = chosen.cards * chosen.batch_size * chosen.sequence_length;
    const step = chosen.gradient_accumulation_steps > 1 ? `${tokens} tokens in a micro-batch of all cards` : `${tokens} tokens a step`;
    answer.replaceChildren(
      element("strong", {}, loqt.required <= budget ? "LoQT fits" : "LoQT does not fit"),
      ` ${chosen.card} GiB (${budget.toFixed(1)} GB): it needs ${loqt.required.toFixed(2)} GB, an assumed margin included. `,
      ranks.length ? `Ranks that fit: ${ranks.map((rank) => hidden / rank).join(", ")}. ` : "No rank fits; try checkpointing, 8 bits or a shorter sequence. ",
      chosen.cards > 1 ? `With DDP each of the ${chosen.cards} cards holds this; ${step}.` : `${step}.`,
    );
    for (const [method, sizes] of found) {
      const fits = sizes.required <= budget ? "fits" : "does not fit";
      const list = element("ol");
      sizes.phases.forEach((size, i) => {
        if (!size) return;
        const bar = element("span", { className: "bar" });
        bar.style.width = `${(100 * size) / largest}%`;
        bar.style.background = `var(--gpu-${method})`;
        const card = element("span", { className: "card" });
        card.style.left = `${(100 * budget) / largest}%`;
        const track = element("span", { className: "track" }, bar, card, element("span", { className: "size" }, `${size.toFixed(2)} GB`));
        list.append(element("li", {}, element("span", {}, data.phases[i]), track));
      });
      const title = element("h3", {}, `${data.methods[method]}: ${fits}, needs ${sizes.required.toFixed(2)} GB`);
      title.dataset.method = method;
      title.dataset.required = sizes.required.toFixed(2);
      title.dataset.phases = sizes.phases.map((size) => size.toFixed(2)).join(" ");
      bars.append(title, list);
    }
    let text = data.code[`${chosen.optimizer} ${Number(chosen.gradient_checkpointing)} ${Number(chosen.per_layer)}`];
    const filled = { MODEL: model, CARD: chosen.card, SEQUENCE: chosen.sequence_length, RANK: hidden / chosen.rank,
      BATCH_SIZE: chosen.batch_size, GRADIENT_ACCUMULATION_STEPS: chosen.gradient_accumulation_steps };
    for (const [name, value] of Object.entries(filled)) text = text.replaceAll(`@${name}@`, value);
    code.querySelector("pre").textContent = text;
    code.hidden = false;
  }

  fill("model", Object.keys(data.models));
  fill("card", data.cards, (size) => `${size} GiB`);
  fill("sequence_length", data.axes.loqt.sequence_length);
  fill("batch_size", data.axes.loqt.batch_size);
  fill("rank", data.axes.loqt.rank);
  const asked = new URLSearchParams(location.hash.slice(1));
  const start = { model: "LLaMA 7B (paper)", card: "24", sequence_length: "1024", rank: "4", optimizer: "adamw_8bit" };
  for (const [name, value] of [...Object.entries(start), ...asked]) {
    const field = form.elements[name];
    if (!field) continue;
    if (field.type === "checkbox") field.checked = value === "true";
    else if ([...field.options].some((option) => option.value === value)) field.value = value;
  }
  form.hidden = false;
  form.addEventListener("input", show);
  form.addEventListener("submit", (event) => event.preventDefault());
  show();
})();
