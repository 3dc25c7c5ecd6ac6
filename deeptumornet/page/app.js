// The page of the service: sends slices, shows the answers. Nothing is stored, and no other host is asked.
"use strict";

const at = (id) => document.getElementById(id);
const percent = (p) => {
  const value = 100 * p;
  if (value > 0 && value < 0.1) return "under 0.1\u00a0%";
  if (value > 99.9 && value < 100) return "over 99.9\u00a0%";
  return `${value.toFixed(1)}\u00a0%`;
};
const visit = [];
let card = null;
let latest = 0;

function element(name, text, className) {
  const made = document.createElement(name);
  if (text !== undefined) made.textContent = text;
  if (className) made.className = className;
  return made;
}

async function sentence(response) {
  try {
    return (await response.json()).detail || response.statusText;
  } catch {
    return `the service answered ${response.status} ${response.statusText}`;
  }
}

const capital = (text) => text.charAt(0).toUpperCase() + text.slice(1);

function fail(text) {
  at("status").textContent = "";
  at("error").textContent = /[.!?]$/.test(text) ? capital(text) : `${capital(text)}.`;
  at("error").hidden = false;
}

const MOST_KEPT = 512;
const isDicom = async (file) => (await file.slice(128, 132).text()) === "DICM";

async function request(path, options = {}) {
  const token = at("access").value;
  let response;
  try {
    response = await fetch(path, { ...options, headers: { ...(token && { Authorization: `Bearer ${token}` }), ...options.headers } });
  } catch {
    throw new Error("the service does not answer: see whether it still runs, and send it again");
  }
  if (!response.ok) {
    if (response.status === 401 && !options.headers?.Authorization) {
      at("gate").hidden = false;
      throw new Error(token ? "this is not the service's token" : "the service asks for a token: give it in the field Token");
    }
    throw new Error(await sentence(response));
  }
  return response.json();
}

const post = (path, body, headers) => request(path, { method: "POST", body, headers });

function ask(path, files) {
  const body = new FormData();
  for (const file of files) body.append("file", file, "slice");
  return post(path, body);
}

const predict = (file) => ask("api/v1/predict?heat_map=true", [file]);

// A turn is over when the next one begins: what it still asks for is not shown.
async function send(files) {
  const turn = ++latest;
  const mine = () => turn === latest;
  at("error").hidden = true;
  at("series").hidden = true;
  at("drop").setAttribute("aria-busy", "true");
  try {
    if (files.length > 1 && (await Promise.all(files.map(isDicom))).every(Boolean)) await sendSeries(files, mine);
    else await sendEach(files, mine);
  } catch (error) {
    if (mine()) {
      at("result").hidden = true;
      fail(error.message);
    }
  } finally {
    if (mine()) at("drop").removeAttribute("aria-busy");
  }
}

async function sendEach(files, mine) {
  let refused = "";
  for (const [k, file] of files.entries()) {
    at("status").textContent = files.length > 1 ? `Reading ${file.name}, ${k + 1} of ${files.length} …` : `Reading ${file.name} …`;
    try {
      const answer = await predict(file);
      if (!mine()) return;
      await show(remember({ name: file.name, answer }));
    } catch (error) {
      if (!mine()) return;
      if (files.length === 1) throw error;
      refused += `${file.name}: ${error.message}. `;
    }
  }
  at("status").textContent = files.length > 1 ? `${files.length} files: done.` : `${files[0].name}: done.`;
  if (refused) fail(refused.trim());
}

async function sendSeries(files, mine) {
  at("status").textContent = `Reading a series of ${files.length} DICOM files …`;
  const { series, slices } = await ask("api/v1/series", files);
  if (!mine()) return;
  const entries = slices.filter((slice) => slice.status === 200).map((slice) => ({
    name: files[slice.item].name, item: slice.item, place: slice.position_mm, file: files[slice.item], answer: slice.prediction }));
  const top = entries.findIndex((entry) => entry.item === series.highest.item);
  at("series-said").textContent = `${series.slices} slices, ${series.positive_slices} of them at or above the threshold. ` +
    `Highest: ${percent(series.highest.probability)}, slice ${top + 1}; mean: ${percent(series.mean)}.` +
    (series.refused ? ` ${series.refused} could not be read.` : "");
  at("series-warning").textContent = series.warnings.join(" ");
  at("bars").replaceChildren(...entries.map((entry) => {
    const bar = element("span", undefined, entry.answer.decision === "positive" ? "positive" : "");
    bar.style.height = `${Math.max(2, 100 * entry.answer.probability)}%`;
    return bar;
  }));
  at("bars-mark").style.bottom = `${100 * entries[0].answer.threshold}%`;
  const walk = at("walk");
  walk.max = entries.length;
  walk.oninput = () => {
    const k = walk.value - 1;
    const where = entries[k].place === null ? "" : `, ${entries[k].place} mm`;
    at("walk-value").textContent = `${k + 1} of ${entries.length}`;
    walk.setAttribute("aria-valuetext", `slice ${k + 1} of ${entries.length}${where}, ${percent(entries[k].answer.probability)}`);
    for (const [n, bar] of [...at("bars").children].entries()) bar.classList.toggle("here", n === k);
    show(entries[k]);
  };
  at("series").hidden = false;
  for (const entry of entries.toReversed()) remember(entry);
  walk.value = top + 1;
  walk.oninput();
  at("status").textContent = `A series of ${files.length} DICOM files: done.`;
}

function remember(entry) {
  visit.unshift(entry);
  visit.length = Math.min(visit.length, MOST_KEPT);
  return entry;
}

let current = null;

// A slice of a series brings its pictures when it is looked at.
async function show(entry) {
  current = entry;
  if (!entry.answer.picture) {
    try {
      entry.answer = await predict(entry.file);
      delete entry.file;
    } catch (error) {
      fail(error.message);
      return;
    }
  }
  if (current === entry) draw(entry);
}

function draw(entry) {
  const { answer, name } = entry;
  const p = answer.probability;
  at("picture").src = answer.picture;
  at("heat").src = answer.heat_map;
  at("caption").textContent = name;
  at("class").textContent = answer.class;
  at("positive").textContent = answer.positive;
  at("probability").textContent = percent(p);
  at("fill").style.width = `${100 * p}%`;
  at("mark").style.left = `${100 * answer.threshold}%`;
  at("bar").setAttribute("aria-label", `${percent(p)}; the threshold is at ${percent(answer.threshold)}`);

  const above = answer.decision === "positive";
  const decision = at("decision");
  decision.replaceChildren(element("strong", above ? "Positive" : "Negative", above ? "tag positive" : "tag"),
    ` ${above ? "at or above" : "below"} the threshold of ${percent(answer.threshold)}.`);
  if (above && answer.class !== answer.positive) {
    decision.append(` The threshold is low on purpose, so that few cases are missed; ${answer.class} is still the more probable class.`);
  } else if (!above && answer.class === answer.positive) {
    decision.append(` ${capital(answer.positive)} is the more probable class, and yet under what the threshold asks for.`);
  }
  const often = Math.round(100 * p);
  at("meaning").textContent = `In words: of 100 slices given this probability, about ${often} would show ${answer.positive}, ` +
    "as far as they resemble the slices that the model was calibrated on.";
  at("warnings").replaceChildren(...answer.warnings.map((text) => element("li", text)));
  at("feedback").hidden = !(card?.feedback && answer.id);
  at("label").value = entry.truth || "";
  at("kept").textContent = entry.truth ? `Kept: ${entry.truth}. Sending again corrects it.` : "";
  at("result").hidden = false;
  list();
}

async function sendTruth(event) {
  event.preventDefault();
  const entry = current;
  const said = { id: entry.answer.id, label: at("label").value, who: at("who").value };
  try {
    await post("api/v1/feedback", JSON.stringify(said), { "Content-Type": "application/json", Authorization: `Bearer ${at("token").value}` });
    entry.truth = said.label;
    if (current === entry) at("kept").textContent = `Kept: ${said.label}. Sending again corrects it.`;
  } catch (error) {
    at("kept").textContent = `${capital(error.message)}.`;
  }
}

function list() {
  at("history-card").hidden = visit.length === 0;
  at("history").replaceChildren(...visit.map((entry) => {
    const row = element("li");
    const button = element("button");
    button.type = "button";
    if (entry === current) button.setAttribute("aria-current", "true");
    const thumbnail = element("img");
    if (entry.answer.picture) thumbnail.src = entry.answer.picture;
    thumbnail.alt = "";
    button.append(thumbnail, element("span", entry.name, "name"), element("span", entry.answer.class), element("b", percent(entry.answer.probability)));
    button.addEventListener("click", () => show(entry));
    row.append(button);
    return row;
  }));
}

const known = (metric) => metric && typeof metric.value === "number";
const interval = (metric) => {
  if (!known(metric)) return "not defined";
  const value = metric.value.toFixed(3);
  return typeof metric.low === "number" ? `${value} (95 % interval ${metric.low.toFixed(3)} to ${metric.high.toFixed(3)})` : value;
};

function limits(card) {
  const { metrics, baseline, threshold } = card;
  const rows = [
    ["Area under the ROC curve, hold-out", interval(metrics.auc)],
    ["Measured on", `${metrics.n} slices of ${metrics.n_groups} patients or groups, none of them trained on`],
    ["Best baseline", `${baseline.name}: ${interval(baseline.auc)}`],
    ["Sensitivity at the threshold", interval(metrics.sensitivity)],
    ["Specificity at the threshold", interval(metrics.specificity)],
    ["Threshold", `${percent(threshold.value)}, chosen on ${threshold.n ?? "the"} ${threshold.chosen_on} slices`],
    ["Network", card.title || card.network],
    ["Starting weights", { none: "none: trained from scratch", imagenet: "ImageNet" }[card.weights] || String(card.weights)],
    ["Version", card.version],
  ];
  at("model").replaceChildren(...rows.filter((row) => row[1] !== "not defined")
    .flatMap(([term, text]) => [element("dt", term), element("dd", text)]));
  if ((card.sources || []).includes("phantom")) {
    at("trained").textContent = "Trained on drawn phantoms, not on patients. Its answer about a real slice means nothing.";
    at("trained").hidden = false;
  }
  const beaten = known(metrics.auc) && known(baseline.auc) && typeof metrics.auc.low === "number" && metrics.auc.low > baseline.auc.value;
  at("limits").textContent = (beaten ? "" : "The interval does not lie above the best baseline: the network may have learned nothing beyond it. ") +
    "These numbers hold for slices like those of the hold-out; another scanner, another hospital or another disease is untested.";
}

async function start() {
  try {
    card = await request("api/v1/model");
    at("label").replaceChildren(element("option"), ...card.classes.map((name) => element("option", name)));
    limits(card);
    at("gate").hidden = true;
    at("error").hidden = true;
  } catch (error) {
    at("limits").textContent = `The model's card could not be read: ${error.message}.`;
  }
}

at("gate").addEventListener("submit", (event) => {
  event.preventDefault();
  start();
});

at("file").addEventListener("change", (event) => {
  const files = [...event.target.files];
  if (files.length) send(files);
  event.target.value = "";
});
at("opacity").addEventListener("input", (event) => {
  at("heat").style.opacity = event.target.value / 100;
  at("opacity-value").textContent = `${event.target.value} %`;
});
at("truth").addEventListener("submit", sendTruth);

// A dropped folder is walked; what a system hides in it (.DS_Store) is left out.
async function within(entry) {
  if (entry.name.startsWith(".")) return [];
  if (entry.isFile) return [await new Promise((resolve, reject) => entry.file(resolve, reject))];
  const reader = entry.createReader();
  const found = [];
  for (let some; (some = await new Promise((resolve, reject) => reader.readEntries(resolve, reject))).length;) found.push(...some);
  found.sort((one, other) => one.name.localeCompare(other.name, "en", { numeric: true }));
  return (await Promise.all(found.map(within))).flat();
}

async function dropped(data) {
  const parts = [...data.items].filter((item) => item.kind === "file").map((item) => item.webkitGetAsEntry() || item.getAsFile());
  const found = (await Promise.all(parts.map((part) => (part instanceof File ? [part] : within(part))))).flat();
  if (found.length) send(found);
  else fail("there is no file in what was dropped");
}

let depth = 0;
for (const name of ["dragenter", "dragover", "dragleave", "drop"]) {
  window.addEventListener(name, (event) => {
    event.preventDefault();
    depth = name === "drop" ? 0 : depth + (name === "dragenter") - (name === "dragleave");
    at("drop").classList.toggle("over", depth > 0);
    if (name === "drop") dropped(event.dataTransfer).catch((error) => fail(error.message));
  });
}
start();
