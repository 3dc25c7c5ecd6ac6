// Shows /openapi.json as it is; no other host is asked.
"use strict";

function element(name, text, className) {
  const made = document.createElement(name);
  if (text !== undefined) made.textContent = text;
  if (className) made.className = className;
  return made;
}

const METHODS = ["get", "put", "post", "delete", "options", "head", "patch", "trace"];

function call(document_, path, method, said, shared) {
  const card = element("section", undefined, "card");
  const heading = element("h2");
  heading.append(element("b", method.toUpperCase(), "tag"), " ", element("code", path));
  card.append(heading, element("p", said.summary));
  const list = element("dl");
  for (const given of [...shared, ...(said.parameters || [])]) {
    list.append(element("dt", `${given.name} (${given.in})`), element("dd", given.description));
  }
  const kinds = Object.keys(said.requestBody?.content || {});
  if (kinds.length) list.append(element("dt", "body"), element("dd", `${kinds.join(", ")}. ${said.requestBody.description || ""}`));
  for (const [status, response] of Object.entries(said.responses)) {
    const found = response.$ref ? response.$ref.split("/").slice(1).reduce((at, key) => at[key], document_) : response;
    list.append(element("dt", status), element("dd", found.description));
  }
  card.append(list);
  return card;
}

async function start() {
  const calls = document.getElementById("calls");
  try {
    const found = await (await fetch("openapi.json")).json();
    document.getElementById("title").textContent = `${found.info.title} ${found.info.version}`;
    document.getElementById("summary").textContent = found.info.description;
    for (const [path, item] of Object.entries(found.paths)) {
      for (const method of METHODS.filter((name) => name in item)) calls.append(call(found, path, method, item[method], item.parameters || []));
    }
  } catch {
    calls.append(element("p", "The document could not be read: reload the page.", "error"));
  }
}
start();
