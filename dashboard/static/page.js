// The live page: listens to /api/live and shows each snapshot. Keeps nothing but the last five minutes, for the charts.
// Whatever comes from the server goes into the page as text, never as markup.

const KEPT_MS = 5 * 60 * 1000;
const GAP_MS = 5000; // no line is drawn across so long a silence
const LATE_S = 5; // older data is marked as such
const RECONNECT_MS = 2000;
const DECISIONS_EVERY_MS = 10_000; // for the opened deployment; at once when its target changes
const HIDDEN_MS = KEPT_MS; // a tab that nobody looks at lets go of its connection after this time

const byId = (id) => document.getElementById(id);

const state = {
  source: null,
  latest: null, // {snapshot, age_s, error} as received
  receivedAt: 0, // performance.now() of that
  isConnected: false,
  isPaused: false,
  opened: decodeURIComponent(location.hash.slice(1)),
  history: new Map(), // tag -> [{at, waiting, running}]
  rows: new Map(), // tag -> {row, detail}
};

// how things are written

const grouped = new Intl.NumberFormat("en-GB");
const count = (n) => grouped.format(n);

function rate(perSecond) {
  if (perSecond === null) return "–";
  if (perSecond === 0) return "0";
  return perSecond < 100 ? perSecond.toFixed(1) : count(Math.round(perSecond));
}

function duration(seconds) {
  const s = Math.max(0, seconds);
  if (s < 10) return `${s.toFixed(1)} s`;
  if (s < 120) return `${Math.floor(s)} s`;
  if (s < 7200) return `${Math.floor(s / 60)} min`;
  if (s < 172_800) return `${Math.floor(s / 3600)} h`;
  return `${Math.floor(s / 86_400)} d`;
}

function size(bytes) {
  const units = ["B", "kB", "MB", "GB", "TB"];
  let unit = 0;
  let value = bytes;
  while (value >= 1024 && unit < units.length - 1) {
    value /= 1024; // as Redis counts: maxmemory 1gb
    unit += 1;
  }
  return `${value.toFixed(value < 10 && unit > 0 ? 1 : 0)} ${units[unit]}`;
}

const plural = (n, one) => `${count(n)} ${one}${n === 1 ? "" : "s"}`;
const sentence = (word) => word.charAt(0).toUpperCase() + word.slice(1).toLowerCase().replaceAll("_", " ");

const TONES = {
  HEALTHY: "good", RUNNING: "good",
  UPDATING: "busy", UPSCALING: "busy", DOWNSCALING: "busy", STARTING: "busy", DRAINING: "busy",
  DEPLOY_FAILED: "bad",
};

// writing into the page

function write(node, text) {
  if (node.textContent !== text) node.textContent = text; // untouched text keeps the reader's selection
}

const field = (root, name) => root.querySelector(`[data-f="${name}"]`);
const part = (root, name) => root.querySelector(`[data-p="${name}"]`);

function fill(root, texts) {
  for (const [name, text] of Object.entries(texts)) write(field(root, name), text);
}

function fillNumber(root, name, text) {
  const node = field(root, name);
  write(node, text);
  node.classList.toggle("zero", text === "0" || text === "–");
}

function fillStatus(root, name, word) {
  const node = field(root, name);
  write(node, sentence(word));
  node.className = `status ${TONES[word] ?? ""}`;
}

const stamp = (id) => byId(id).content.firstElementChild.cloneNode(true);

function replaceAll(parent, nodes) {
  parent.replaceChildren(...nodes);
}

// time

const sinceReceived = () => (performance.now() - state.receivedAt) / 1000;
const ageNow = () => (state.latest?.age_s ?? 0) + sinceReceived();
// The server's clock at this moment, as far as we know it: ages are differences of its times.
const serverNow = () => state.latest.snapshot.taken_ms + ageNow() * 1000;
const ago = (atMs) => duration((serverNow() - atMs) / 1000);

// the line at the top, and what is wrong

function showAge() {
  const line = byId("age-line");
  const hasData = Boolean(state.latest?.snapshot);
  const age = ageNow();
  line.classList.toggle("paused", state.isPaused);
  line.classList.toggle("late", hasData && !state.isPaused && age > LATE_S);
  if (!hasData) write(byId("age"), state.isConnected ? "no data" : "connecting");
  else if (state.isPaused) write(byId("age"), `paused, data ${duration(age)} old`);
  else write(byId("age"), age < 2 ? "data now" : `data ${duration(age)} old`);
  showBanner(hasData, age);
  for (const { detail } of state.rows.values()) if (detail) showTimes(detail);
}

function showBanner(hasData, age) {
  const shown = hasData ? ` What you see was true ${duration(age)} ago.` : "";
  let text = "";
  if (state.isPaused) text = "";
  else if (!state.isConnected && sinceReceived() > LATE_S) {
    text = `The dashboard does not answer; is “millstream dashboard” still running?${shown}`;
  } else if (state.latest?.error) text = `${sentenceStart(state.latest.error)}.${shown}`;
  const banner = byId("banner");
  write(banner, text);
  banner.hidden = text === "";
  document.title = `${text ? "▲ " : ""}millstream`;
}

const sentenceStart = (text) => text.charAt(0).toUpperCase() + text.slice(1).replace(/\.$/, "");

function showProblems(problems) {
  const list = byId("problems");
  const texts = problems.map((problem) => `${problem.level} ${problem.text}`).join("\n");
  list.hidden = problems.length === 0;
  if (list.dataset.shown === texts) return;
  list.dataset.shown = texts;
  replaceAll(list, problems.map((problem) => {
    const item = document.createElement("li");
    const label = document.createElement("b");
    const text = document.createElement("span");
    item.className = problem.level;
    write(label, sentence(problem.level));
    write(text, problem.text);
    item.append(label, text);
    return item;
  }));
}

// overview

function showOverview(snapshot) {
  const { server, nodes, autoscaler, totals } = snapshot;
  const alive = nodes.filter((node) => node.is_alive);
  const root = byId("overview");
  write(byId("namespace"), server.namespace);
  write(byId("url"), server.url);
  fill(root, {
    server: `${server.kind} ${server.version}`,
    "server-note": `up ${duration(server.uptime_s)}, ${plural(server.connected_clients, "client")}, append-only file ${server.is_aof_on ? "on" : "off"}`,
    memory: size(server.used_memory_bytes),
    "memory-note": `${server.maxmemory_bytes ? `of ${size(server.maxmemory_bytes)}` : "no limit set"}, ${server.eviction_policy}`,
    nodes: count(alive.length),
    "nodes-note": alive.map((node) => `${node.node} (${node.replicas})`).join(", ") || "no launcher lives",
    leader: autoscaler ? autoscaler.name : "none",
    "leader-note": autoscaler ? `leads, fence ${count(autoscaler.fence)}` : "targets stay as they are",
    requests: `${count(totals.waiting)} waiting`,
    "requests-note": `${count(totals.in_flight)} in flight, ${count(totals.parked)} parked, ${count(totals.delayed)} delayed`,
    flow: `${rate(totals.arrivals_per_s)} / ${rate(totals.completions_per_s)}`,
    "flow-note": plural(totals.dead_letters, "dead letter"),
  });
  field(root, "nodes").classList.toggle("bad", alive.length === 0);
  field(root, "leader").classList.toggle("bad", autoscaler === null);
}

// the table

function showDeployments(deployments) {
  const body = byId("rows");
  const present = new Set(deployments.map((deployment) => deployment.tag));
  for (const [tag, { row, detail }] of state.rows) {
    if (present.has(tag)) continue;
    row.remove();
    detail?.remove();
    state.rows.delete(tag);
    state.history.delete(tag);
  }
  let before = null;
  for (const deployment of deployments) {
    const entry = state.rows.get(deployment.tag) ?? addRow(deployment.tag);
    const expected = before ? before.nextElementSibling : body.firstElementChild;
    if (entry.row !== expected) body.insertBefore(entry.row, expected);
    if (entry.detail && entry.detail !== entry.row.nextElementSibling) entry.row.after(entry.detail);
    before = entry.detail ?? entry.row;
    showRow(entry.row, deployment);
  }
  byId("filter-label").hidden = deployments.length <= 8;
  applyFilter();
}

function addRow(tag) {
  const row = stamp("row-template");
  row.dataset.tag = tag;
  row.querySelector(".chart-cell").append(newChart());
  row.addEventListener("click", () => {
    if (!String(getSelection())) open(state.opened === tag ? "" : tag);
  });
  const entry = { row, detail: null, decisions: null, readAt: 0, readTarget: undefined };
  state.rows.set(tag, entry);
  return entry;
}

function showRow(row, deployment) {
  const { limits } = deployment;
  fill(row, {
    name: deployment.name,
    app: deployment.app,
    replicas: `${count(deployment.running)} / ${deployment.target === null ? "–" : count(deployment.target)}`,
    limits: limits.min === limits.max ? "fixed" : `${limits.min}–${limits.max}`,
  });
  fillStatus(row, "status", deployment.status);
  for (const name of ["waiting", "in_flight", "parked", "delayed"]) fillNumber(row, name, count(deployment[name]));
  fillNumber(row, "arrivals", rate(deployment.arrivals_per_s));
  fillNumber(row, "completions", rate(deployment.completions_per_s));
  fillNumber(row, "oldest", deployment.oldest_waiting_s === null ? "–" : duration(deployment.oldest_waiting_s));
  drawChart(row.querySelector("svg"), deployment.tag);
  row.classList.toggle("opened", deployment.tag === state.opened);
  row.querySelector(".open").setAttribute("aria-expanded", String(deployment.tag === state.opened));
}

function applyFilter() {
  const wanted = byId("filter-label").hidden ? "" : byId("filter").value.trim().toLowerCase();
  let shown = 0;
  for (const [tag, { row, detail }] of state.rows) {
    const isHidden = !tag.toLowerCase().includes(wanted);
    row.hidden = isHidden;
    if (detail) detail.hidden = isHidden;
    if (!isHidden) shown += 1;
  }
  byId("no-match").hidden = shown > 0;
}

// one deployment, opened

function open(tag) {
  state.opened = tag;
  history.replaceState(null, "", tag ? `#${encodeURIComponent(tag)}` : location.pathname);
  if (state.latest?.snapshot) show(state.latest.snapshot);
}

function showDetail(deployments) {
  for (const [tag, entry] of state.rows) {
    if (tag !== state.opened && entry.detail) {
      entry.detail.remove();
      Object.assign(entry, { detail: null, decisions: null, readAt: 0 });
    }
  }
  const deployment = deployments.find((one) => one.tag === state.opened);
  const entry = deployment && state.rows.get(deployment.tag);
  if (!entry) return;
  if (!entry.detail) {
    entry.detail = stamp("detail-template");
    entry.detail.querySelector(".ends").before(newChart());
    entry.row.after(entry.detail);
  }
  fillDetail(entry.detail, deployment);
  readDecisions(entry, deployment);
}

function fillDetail(detail, deployment) {
  const { limits } = deployment;
  const range = limits.min === limits.max ? plural(limits.min, "replica") : `${limits.min} to ${limits.max} replicas`;
  fill(detail, {
    failure: deployment.failure ? `Cannot start: ${deployment.failure}` : "",
    traceback: deployment.traceback,
    version: deployment.version,
    policy: `${deployment.policy}, ${range}${limits.set_by === "operator" ? ", set by an operator" : ""}`,
    max_ongoing: deployment.max_ongoing_requests === null ? "default" : count(deployment.max_ongoing_requests),
    attempts: `at most ${deployment.max_attempts}`,
    dead: count(deployment.dead_letters),
    reason: deployment.reason || "no decision yet",
  });
  part(detail, "failure").hidden = !deployment.failure;
  field(detail, "traceback").hidden = !deployment.traceback;
  field(detail, "dead").classList.toggle("bad", deployment.dead_letters > 0);
  const points = state.history.get(deployment.tag) ?? [];
  const highest = (name) => count(Math.max(0, ...points.map((point) => point[name])));
  fill(detail, {
    "chart-waiting": `waiting: ${count(deployment.waiting)} now, ${highest("waiting")} at most`,
    "chart-replicas": `running replicas: ${count(deployment.running)} now, ${highest("running")} at most`,
  });
  drawChart(detail.querySelector("svg"), deployment.tag);
  showReplicas(detail, deployment);
  showTimes(detail);
}

function showReplicas(detail, deployment) {
  const texts = JSON.stringify(deployment.replicas);
  if (detail.dataset.replicas === texts) return;
  detail.dataset.replicas = texts;
  replaceAll(part(detail, "replicas"), deployment.replicas.map((replica) => {
    const line = stamp("replica-template");
    fill(line, { replica: replica.replica, node: replica.node, pid: String(replica.pid) });
    fillStatus(line, "state", replica.state);
    if (!replica.is_current) field(line, "state").append(" (old version)");
    field(line, "up").dataset.since = replica.started_ms;
    return line;
  }));
  const none = part(detail, "no-replicas");
  none.hidden = deployment.replicas.length > 0;
  part(detail, "replicas").parentElement.hidden = deployment.replicas.length === 0;
  write(none, deployment.target === 0 ? "None: the target is 0. The first request starts one." : "None yet.");
}

function showTimes(detail) {
  for (const node of detail.querySelectorAll("[data-since]")) write(node, ago(Number(node.dataset.since)));
  for (const node of detail.querySelectorAll("[data-at]")) write(node, `${ago(Number(node.dataset.at))} ago`);
}

async function readDecisions(entry, deployment) {
  const now = performance.now();
  if (entry.readTarget === deployment.target && entry.readAt && now - entry.readAt < DECISIONS_EVERY_MS) return;
  Object.assign(entry, { readAt: now, readTarget: deployment.target });
  try {
    const answer = await fetch(`api/deployments/${encodeURIComponent(deployment.tag)}/decisions`);
    const body = await answer.json();
    if (!answer.ok) throw new Error(body.error);
    if (entry.detail) showDecisions(entry.detail, body.decisions);
  } catch (error) {
    if (entry.detail) showNoDecisions(entry.detail, `cannot be read now: ${error.message}`);
  }
}

function showDecisions(detail, decisions) {
  replaceAll(part(detail, "decisions"), decisions.map((decision) => {
    const line = stamp("decision-template");
    fill(line, {
      change: `${decision.was === null ? "new" : count(decision.was)} → ${count(decision.target)}`,
      why: decision.reason,
      inputs: Object.entries(decision.inputs).map(([name, value]) => `${name.replaceAll("_", " ")} ${value}`).join(" · "),
    });
    const when = field(line, "ago");
    when.dataset.at = decision.at_ms;
    when.title = new Date(decision.at_ms).toLocaleString();
    return line;
  }));
  showNoDecisions(detail, decisions.length ? "" : "None yet.");
  showTimes(detail);
}

function showNoDecisions(detail, text) {
  const line = part(detail, "no-decisions");
  write(line, text);
  line.hidden = text === "";
}

// charts

const SVG = "http://www.w3.org/2000/svg";
const WIDTH = 300; // one unit per second; the drawing is stretched to its place
const HEIGHT = 40;

function newChart() {
  const svg = document.createElementNS(SVG, "svg");
  svg.setAttribute("viewBox", `0 0 ${WIDTH} ${HEIGHT}`);
  svg.setAttribute("preserveAspectRatio", "none");
  svg.setAttribute("role", "img");
  for (const name of ["area", "base", "waiting", "replicas"]) {
    const path = document.createElementNS(SVG, "path");
    path.setAttribute("class", name);
    svg.append(path);
  }
  svg.querySelector(".base").setAttribute("d", `M0 ${HEIGHT - 1}H${WIDTH}`);
  return svg;
}

function drawChart(svg, tag) {
  const points = state.history.get(tag) ?? [];
  if (points.length === 0) return;
  const end = points.at(-1).at;
  const x = (point) => WIDTH - (WIDTH * (end - point.at)) / KEPT_MS;
  const scale = (name) => {
    const highest = Math.max(1, ...points.map((point) => point[name]));
    return (point) => HEIGHT - 1 - ((HEIGHT - 5) * point[name]) / highest;
  };
  const waiting = scale("waiting");
  const running = scale("running");
  const stretches = split(points);
  const draw = (name, line) => svg.querySelector(name).setAttribute("d", stretches.map(line).join(""));
  const at = (point, y) => `${x(point).toFixed(1)} ${y(point).toFixed(1)}`;
  draw(".waiting", (some) => `M${some.map((point) => at(point, waiting)).join("L")}`);
  draw(".area", (some) => `M${x(some[0]).toFixed(1)} ${HEIGHT - 1}L${some.map((point) => at(point, waiting)).join("L")}L${x(some.at(-1)).toFixed(1)} ${HEIGHT - 1}Z`);
  draw(".replicas", (some) => `M${at(some[0], running)}${some.slice(1).map((point) => `H${x(point).toFixed(1)}V${running(point).toFixed(1)}`).join("")}`);
  const highest = Math.max(...points.map((point) => point.waiting));
  svg.setAttribute("aria-label", `last 5 minutes: ${points.at(-1).waiting} waiting now, ${highest} at most; ${points.at(-1).running} replicas now`);
}

function split(points) {
  const stretches = [[points[0]]];
  for (const point of points.slice(1)) {
    const last = stretches.at(-1);
    if (point.at - last.at(-1).at > GAP_MS) stretches.push([point]);
    else last.push(point);
  }
  return stretches;
}

function remember(snapshot) {
  for (const deployment of snapshot.deployments) {
    const points = state.history.get(deployment.tag) ?? [];
    if (points.length && points.at(-1).at >= snapshot.taken_ms) {
      if (points.at(-1).at === snapshot.taken_ms) continue; // the same look again, during an outage
      points.length = 0; // the server's clock was set back
    }
    points.push({ at: snapshot.taken_ms, waiting: deployment.waiting, running: deployment.running });
    while (points[0].at < snapshot.taken_ms - KEPT_MS) points.shift();
    state.history.set(deployment.tag, points);
  }
}

// putting it together

function show(snapshot) {
  const isEmpty = snapshot.deployments.length === 0;
  byId("overview").hidden = false;
  byId("deployments").hidden = isEmpty;
  byId("empty").hidden = !isEmpty;
  showOverview(snapshot);
  showProblems(snapshot.problems);
  showDeployments(snapshot.deployments);
  showDetail(snapshot.deployments);
}

function receive(latest) {
  state.latest = latest;
  state.receivedAt = performance.now();
  state.isConnected = true;
  if (latest.snapshot) {
    remember(latest.snapshot);
    show(latest.snapshot);
  }
  showAge();
}

function connect() {
  state.source?.close();
  const source = new EventSource("api/live");
  state.source = source;
  source.onmessage = (event) => receive(JSON.parse(event.data));
  source.onerror = () => {
    state.isConnected = false;
    // The browser reconnects by itself unless it was refused.
    if (source.readyState === EventSource.CLOSED) setTimeout(() => source === state.source && connect(), RECONNECT_MS);
  };
}

function disconnect() {
  state.source?.close();
  state.source = null;
}

byId("pause").addEventListener("click", () => {
  state.isPaused = !state.isPaused;
  byId("pause").setAttribute("aria-pressed", String(state.isPaused));
  write(byId("pause"), state.isPaused ? "Resume" : "Pause");
  if (state.isPaused) disconnect();
  else connect();
  showAge();
});

byId("filter").addEventListener("input", applyFilter);

addEventListener("hashchange", () => open(decodeURIComponent(location.hash.slice(1))));

let letGo = 0;
document.addEventListener("visibilitychange", () => {
  clearTimeout(letGo);
  if (document.hidden) letGo = setTimeout(disconnect, HIDDEN_MS);
  else if (!state.source && !state.isPaused) connect();
});

setInterval(showAge, 1000);
connect();
