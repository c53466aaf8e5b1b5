// The documentation page: shows /openapi.json and lets one send a chat request.
// Everything is written as text nodes, so nothing that a model says can become markup.

const BASE = new URL(".", location.href); // the page may be behind a path prefix
const $ = (id) => document.getElementById(id);

function node(tag, props = {}, ...children) {
  const made = Object.assign(document.createElement(tag), props);
  made.append(...children.filter((child) => child !== null));
  return made;
}

// Descriptions use backticks for code, and no other markup.
function prose(text = "") {
  return text.split("`").map((part, i) => (i % 2 ? node("code", {}, part) : part));
}

// ---- The description ---------------------------------------------------------------------

let spec;

function resolve(object) {
  if (!object?.$ref) return object;
  return object.$ref.slice(2).split("/").reduce((at, key) => at[key], spec);
}

function typeName(schema) {
  if (schema.$ref) return schema.$ref.split("/").pop();
  if (schema.oneOf) return schema.oneOf.map(typeName).join(" or ");
  if (schema.type === "array") return `list of ${typeName(schema.items ?? {})}`;
  if (schema.const !== undefined) return JSON.stringify(schema.const);
  if (schema.enum) return schema.enum.join(" | ");
  return [schema.type ?? "any"].flat().join(" or ");
}

function limits(schema) {
  const found = [];
  if (schema.minimum !== undefined) found.push(`at least ${schema.minimum}`);
  if (schema.exclusiveMinimum !== undefined) found.push(`above ${schema.exclusiveMinimum}`);
  if (schema.maximum !== undefined) found.push(`at most ${schema.maximum}`);
  if (schema.maxLength !== undefined) found.push(`up to ${schema.maxLength} characters`);
  if (schema.default !== undefined) found.push(`default ${JSON.stringify(schema.default)}`);
  return found.length ? ` (${found.join(", ")})` : "";
}

// The object whose fields are worth showing below a field, if there is one.
function inner(schema) {
  const target = resolve(schema);
  if (target.properties) return target;
  if (target.items) return inner(target.items);
  if (typeof target.additionalProperties === "object") return inner(target.additionalProperties);
  return null;
}

function fieldTable(caption, rows) {
  const head = ["Name", "Type", "Meaning"].map((text) => node("th", { scope: "col" }, text));
  return node(
    "table",
    { ariaLabel: caption },
    node("thead", {}, node("tr", {}, ...head)),
    node("tbody", {}, ...rows),
  );
}

function fieldRow(name, schema, description, required) {
  return node(
    "tr",
    {},
    node(
      "th",
      { scope: "row" },
      node("code", {}, name),
      required ? node("span", { className: "need" }, " required") : null,
    ),
    node("td", { className: "type" }, typeName(schema) + limits(schema)),
    node("td", {}, ...prose(description)),
  );
}

function fields(schema, caption) {
  const target = resolve(schema);
  if (!target.properties) return node("p", { className: "type" }, typeName(target));
  const needs = new Set(target.required ?? []);
  const rows = [];
  for (const [name, field] of Object.entries(target.properties)) {
    rows.push(fieldRow(name, field, field.description, needs.has(name)));
    const below = inner(field);
    if (below) {
      const more = node(
        "details",
        { className: "nested" },
        node("summary", {}, "Fields of ", node("code", {}, name)),
        fields(below, `Fields of ${name}`),
      );
      rows.push(node("tr", {}, node("td", { colSpan: 3 }, more)));
    }
  }
  return fieldTable(caption, rows);
}

function bodies(content) {
  return Object.entries(content ?? {}).flatMap(([type, media]) => {
    const found = [node("h4", {}, node("code", {}, type))];
    if (media.schema.description) found.push(node("p", {}, ...prose(media.schema.description)));
    if (media["x-event-schema"]) found.push(fields(media["x-event-schema"], "Fields of each event"));
    else if (inner(media.schema)) found.push(fields(media.schema, `Fields of ${type}`));
    const examples = media.example ? { example: { value: media.example } } : media.examples;
    for (const [name, example] of Object.entries(examples ?? {})) {
      found.push(
        node(
          "details",
          { className: "nested" },
          node("summary", {}, media.example ? "Example" : node("code", {}, name)),
          node("pre", {}, JSON.stringify(example.value, null, 2)),
        ),
      );
    }
    return found;
  });
}

function responseRow([status, reference]) {
  const response = resolve(reference);
  const headers = Object.entries(response.headers ?? {}).map(([name, header]) => {
    const { schema, description } = resolve(header);
    return fieldRow(name, schema, description, false);
  });
  const more = node(
    "details",
    { className: "nested" },
    node("summary", {}, "Headers and body"),
    headers.length ? fieldTable(`Headers of ${status}`, headers) : null,
    ...bodies(response.content),
  );
  return node(
    "tr",
    {},
    node("th", { scope: "row" }, status === "default" ? "others" : status),
    node("td", {}, node("p", {}, ...prose(response.description)), more),
  );
}

function operation(path, method, op) {
  const parameters = (op.parameters ?? []).map(resolve);
  const rows = parameters.map((p) =>
    fieldRow(p.name, p.schema, `${p.description} (${p.in})`, p.required),
  );
  return node(
    "details",
    { className: "operation", id: op.operationId },
    node(
      "summary",
      {},
      node("span", { className: `method ${method}` }, method.toUpperCase()),
      " ",
      node("code", { className: "path" }, path),
      " ",
      node("span", { className: "summary" }, op.summary),
    ),
    rows.length ? node("h3", {}, "Parameters") : null,
    rows.length ? fieldTable("Parameters", rows) : null,
    op.requestBody ? node("h3", {}, "Body") : null,
    ...(op.requestBody ? bodies(op.requestBody.content) : []),
    node("h3", {}, "Responses"),
    node("table", { ariaLabel: "Responses" }, node("tbody", {}, ...Object.entries(op.responses).map(responseRow))),
  );
}

// A closed <details> cannot be scrolled to usefully: open the one that the address names.
function openNamed() {
  const target = $(location.hash.slice(1));
  if (!target?.matches("details")) return;
  target.open = true;
  target.scrollIntoView();
}

function show() {
  $("version").textContent = spec.info.version;
  $("about").replaceChildren(...prose(spec.info.description));
  const links = [];
  for (const tag of spec.tags) {
    const section = node("section", {}, node("h2", {}, tag.name), node("p", {}, tag.description));
    for (const [path, methods] of Object.entries(spec.paths)) {
      for (const [method, op] of Object.entries(methods)) {
        if (!op.tags.includes(tag.name)) continue;
        section.append(operation(path, method, op));
        links.push(node("li", {}, node("a", { href: `#${op.operationId}` }, path)));
      }
    }
    $("operations").append(section);
  }
  $("contents").append(node("ul", {}, ...links));
  addEventListener("hashchange", openNamed);
  openNamed();
}

// ---- Try it ------------------------------------------------------------------------------

const form = $("form");
let leave = null; // the AbortController of the request under way

function request() {
  const data = new FormData(form);
  const body = {
    model: data.get("model").trim() || "auto",
    messages: [{ role: "user", content: data.get("message") }],
    max_tokens: Number(data.get("max_tokens")),
  };
  if (data.get("temperature")) body.temperature = Number(data.get("temperature"));
  if (data.get("stream")) {
    body.stream = true;
    body.stream_options = { include_usage: true };
  }
  return { body, key: data.get("key").trim() };
}

// The key itself stays out of the command, which people paste into tickets and chats.
function showCurl() {
  const { body, key } = request();
  const quoted = JSON.stringify(body).replaceAll("'", "'\\''");
  const lines = [
    `curl -sS ${body.stream ? "-N " : ""}${new URL("v1/chat/completions", BASE)}`,
    "-H 'Content-Type: application/json'",
    ...(key ? ['-H "Authorization: Bearer $CITADEL_API_KEY"'] : []),
    `-d '${quoted}'`,
  ];
  $("curl").value = lines.join(" \\\n  ");
}

const SHOWN = /^(x-citadel-|x-ratelimit-|x-request-id$|retry-after|x-should-retry$)/;

function showFacts(response, times) {
  const rows = [["status", String(response.status)]];
  if (times.first) rows.push(["time to first token", `${Math.round(times.first - times.sent)} ms`]);
  if (times.ended) rows.push(["whole time", `${Math.round(times.ended - times.sent)} ms`]);
  if (times.usage) {
    const tokens = times.usage.completion_tokens;
    rows.push(["tokens", `${times.usage.prompt_tokens} in, ${tokens} out`]);
    const seconds = (times.ended - times.first) / 1000;
    if (seconds > 0 && tokens > 1) {
      rows.push(["tokens a second", ((tokens - 1) / seconds).toFixed(1)]);
    }
  }
  for (const [name, value] of response.headers) if (SHOWN.test(name)) rows.push([name, value]);
  const made = rows.map(([name, value]) =>
    node("tr", {}, node("th", { scope: "row" }, name), node("td", {}, value)),
  );
  $("facts").replaceChildren(node("tbody", {}, ...made));
}

// The events of a stream, parsed; `null` stands for [DONE].
async function* events(stream) {
  let rest = "";
  for await (const text of chunks(stream.pipeThrough(new TextDecoderStream()))) {
    const parts = (rest + text).split(/\r?\n\r?\n/);
    rest = parts.pop();
    for (const part of parts) {
      const lines = part.split(/\r?\n/).filter((line) => line.startsWith("data:"));
      const data = lines.map((line) => line.slice(5).trimStart()).join("\n");
      if (data === "[DONE]") yield null;
      else if (data) yield JSON.parse(data);
    }
  }
}

// Not every browser can iterate over a stream.
async function* chunks(stream) {
  const reader = stream.getReader();
  for (;;) {
    const { done, value } = await reader.read();
    if (done) return;
    yield value;
  }
}

async function readStream(response, times) {
  let complete = false;
  for await (const event of events(response.body)) {
    if (event === null) {
      complete = true;
      continue;
    }
    if (event.error) throw new Error(`${event.error.message} (${event.error.code})`);
    if (event.usage) times.usage = event.usage;
    const delta = event.choices?.[0]?.delta;
    const text = delta?.content ?? delta?.reasoning_content;
    if (!text) continue;
    if (!times.first) {
      times.first = performance.now();
      showFacts(response, times);
    }
    $("answer").append(text);
  }
  if (!complete) throw new Error("The stream ended early.");
}

// A button that is switched off loses the focus: the other one gets it.
function switchOff(button, other) {
  $(other).disabled = false;
  if (document.activeElement === $(button)) $(other).focus();
  $(button).disabled = true;
}

async function send() {
  const { body, key } = request();
  const headers = { "content-type": "application/json" };
  if (key) headers.authorization = `Bearer ${key}`;
  const times = { sent: performance.now() };
  leave = new AbortController();
  $("answer").replaceChildren();
  $("facts").replaceChildren();
  switchOff("send", "stop");
  $("state").textContent = "Waiting…";
  let response = null;
  try {
    response = await fetch(new URL("v1/chat/completions", BASE), {
      method: "POST",
      headers,
      body: JSON.stringify(body),
      signal: leave.signal,
    });
    showFacts(response, times);
    const type = response.headers.get("content-type") ?? "";
    if (type.startsWith("text/event-stream")) {
      $("state").textContent = "Streaming…";
      await readStream(response, times);
    } else {
      const text = await response.text();
      if (!response.ok) throw new Error(text || `Status ${response.status}`);
      const answer = JSON.parse(text);
      times.usage = answer.usage;
      $("answer").append(answer.choices?.[0]?.message?.content ?? text);
    }
    $("state").textContent = "Done.";
  } catch (problem) {
    const stopped = problem.name === "AbortError";
    $("state").textContent = stopped ? "Stopped." : "Failed.";
    if (!stopped) $("answer").append(node("span", { className: "bad" }, `\n${problem.message}`));
  } finally {
    times.ended = performance.now();
    if (response) showFacts(response, times);
    switchOff("stop", "send");
    leave = null;
  }
}

async function copyCurl() {
  $("curl").select();
  try {
    await navigator.clipboard.writeText($("curl").value);
  } catch {
    document.execCommand("copy"); // the clipboard interface is for secure origins only
  }
  $("state").textContent = "Copied.";
}

// A convenience: without it the model can still be typed.
async function offerModels() {
  const response = await fetch(new URL("v1/models", BASE));
  if (!response.ok) return;
  const { data } = await response.json();
  $("models").append(...data.map((model) => node("option", { value: model.id })));
}

form.addEventListener("input", showCurl);
form.addEventListener("submit", (event) => {
  event.preventDefault();
  if (leave === null) send();
});
$("stop").addEventListener("click", () => leave?.abort());
$("copy").addEventListener("click", copyCurl);
showCurl();
offerModels().catch(() => {});

try {
  const response = await fetch(new URL("openapi.json", BASE));
  if (!response.ok) throw new Error(`status ${response.status}`);
  spec = await response.json();
  show();
} catch (problem) {
  $("about").replaceChildren(`The description could not be loaded: ${problem.message}`);
}
