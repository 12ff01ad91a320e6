// The console: puts the parts together and holds what is shown.
import * as api from "./api.js";
import { Composer } from "./composer.js";
import { byId } from "./dom.js";
import { askForKey, findKey } from "./key.js";
import { accept, announceGap, conversation, emptyLog, expect, isEnded, merge } from "./log.js";
import { SessionList, sessionUrl } from "./sessions.js";
import { SessionStream } from "./stream.js";
import { UsageWatch } from "./usage.js";
import { spoken, View } from "./view.js";

const REFRESH = 10_000; // ms between looks at the list of sessions while the page is seen
const LIST_LAG = 500; // ms that the list of sessions may be behind the log
const REPLAY = 1_500; // ms after which what the log keeps of a session counts as read
const PROMPT_LIMIT = 2_000; // characters of the question that are shown to other watchers

const now = () => Date.now() / 1_000;

const shown = { session: null, log: emptyLog(), stream: null, billing: null };
let listed = [];
let olderThan = null;
let replay = null;

const view = new View({ cancel });
const list = new SessionList({ open: (session) => visit(session), more: () => refresh(olderThan) });
const composer = new Composer({ ask });
const watch = new UsageWatch({
  look: (name) => api.readUsage(shown.billing, name),
  onUsage: setUsage,
  onSilence: (name) => setUsage(name, false),
});

/** Show a session (`null`: the welcome), its records and its events. */
function show(session) {
  shown.stream?.close();
  clearTimeout(replay);
  const log = emptyLog();
  const stream = new SessionStream((cursor) => api.eventsUrl(session, cursor), {
    event: (event) => received(log, event),
    gap: () => gapSaid(log),
    status: (status) => connectionChanged(status),
  });
  Object.assign(shown, { session, log, stream });
  view.hideProblem();
  view.show(session, log, stream);
  list.mark(session);
  setMenu(false);
}

/** Show a session that may exist: look up its generations, then read its events. */
async function enter(session) {
  show(session);
  if (!session) return;
  const { log, stream } = shown;
  try {
    const { generations = [] } = await api.readSession(session);
    if (shown.log !== log) return;
    for (const record of generations) view.change(merge(log, record));
    stream.open();
  } catch (problem) {
    if (shown.log !== log || problem.status === 404) return; // not there yet: the first question makes it
    complain(problem, { label: "Try again", act: () => enter(session) });
  }
}

function visit(session) {
  history.pushState(null, "", session ? sessionUrl(session) : "/");
  enter(session);
  byId("question").focus();
}

async function ask({ text, model, withHistory, key }) {
  const session = shown.session ?? api.drawName("chat-");
  const earlier = withHistory ? conversation(shown.log) : [];
  const body = {
    model,
    messages: [...earlier, { role: "user", content: text }],
    metadata: { prompt: text.slice(0, PROMPT_LIMIT) },
  };
  try {
    const receipt = await api.ask(session, body, key);
    view.hideProblem();
    if (shown.session !== session) {
      history.pushState(null, "", sessionUrl(session));
      show(session);
    }
    view.change(expect(shown.log, receipt.generation, { model, prompt: text }));
    view.follow();
    view.announce("Question sent");
    if (["idle", "ended", "refused"].includes(shown.stream.status.kind)) shown.stream.open();
    refresh();
    return true;
  } catch (problem) {
    complain(problem);
    return false;
  }
}

async function cancel(generation) {
  const before = generation.state;
  generation.state = "cancelling";
  view.change(generation);
  try {
    await api.cancel(shown.session, generation.name);
  } catch (problem) {
    if (generation.state === "cancelling") generation.state = before;
    view.change(generation);
    view.showProblem(problem);
  }
}

function received(log, event) {
  const generation = accept(log, event);
  view.redraw();
  if (!generation) return;
  view.change(generation);
  if (event.type === "started" && view.replayed) view.announce(spoken(generation));
  if (generation.position.ended) {
    settle(generation);
    if (event.type !== "usage" && view.replayed) {
      view.announce(spoken(generation));
      setTimeout(refresh, LIST_LAG);
    }
  }
}

/** Ask billing about a generation that has ended. */
function settle(generation) {
  if (shown.billing) watch.watch(generation.name);
}

function setUsage(name, usage) {
  const generation = shown.log.generations.get(name);
  if (generation) view.setUsage(generation, usage);
}

function gapSaid(log) {
  announceGap(log);
  view.showProblem({ title: "Events are missing", detail: "The log no longer keeps a part of this session.", slug: "" });
}

function connectionChanged(status) {
  view.redraw();
  if (status.kind === "live" && !view.replayed) {
    clearTimeout(replay);
    replay = setTimeout(replayRead, REPLAY);
  }
  if (status.kind === "dropped") view.announce("Connection dropped");
  if (status.kind === "refused") refused(status.problem);
}

function refused(problem) {
  const { session } = shown;
  const again = problem.status === 410 || problem.status === 400;
  const action = again ? { label: "Read from the start", act: () => enter(session) } : null;
  complain(problem, action);
}

/** Show a problem; one of credentials can be mended with another key. */
function complain(problem, action = null) {
  view.showProblem(problem, problem.status === 401 ? { label: "Enter a key", act: changeKey } : action);
}

async function changeKey() {
  await askForKey();
  view.hideProblem();
  refresh();
  await enter(shown.session);
}

function replayRead() {
  view.setReplayed();
  for (const generation of shown.log.generations.values()) {
    if (isEnded(generation) && generation.read === 0) settle(generation);
  }
}

/** Read the list of sessions: its first page, or the one after `after`. */
async function refresh(after = null) {
  try {
    const page = await api.listSessions(after);
    const names = new Set(page.sessions.map(({ session }) => session));
    const rest = listed.filter(({ session }) => !names.has(session));
    const first = olderThan === null || after !== null;
    listed = after ? [...rest, ...page.sessions] : [...page.sessions, ...rest];
    if (first) olderThan = page.next ?? null;
    list.update(listed, shown.session, now(), olderThan !== null);
    if (names.has(shown.session) && shown.stream.status.kind === "idle") enter(shown.session);
  } catch {
    // The list is a convenience: it is asked for again, and what needs the service says so itself.
  }
}

function setMenu(open) {
  document.body.classList.toggle("menu-open", open);
  byId("menu").setAttribute("aria-expanded", String(open));
}

function listen() {
  byId("drop").addEventListener("click", () => shown.stream.drop());
  byId("resume").addEventListener("click", () => {
    view.hideProblem();
    shown.stream.open();
    view.announce("Resumed");
  });
  byId("change-key").addEventListener("click", changeKey);
  byId("menu").addEventListener("click", () => setMenu(!document.body.classList.contains("menu-open")));
  byId("main").addEventListener("click", () => setMenu(false));
  byId("new-session").addEventListener("click", (click) => {
    if (click.ctrlKey || click.metaKey || click.shiftKey) return;
    click.preventDefault();
    visit(null);
  });
  byId("examples").addEventListener("click", (click) => {
    const example = click.target.closest("button");
    if (example) composer.propose(example.textContent);
  });
  addEventListener("keydown", (key) => {
    if (key.key !== "Escape" || !document.body.classList.contains("menu-open")) return;
    setMenu(false);
    byId("menu").focus();
  });
  addEventListener("popstate", () => enter(sessionInAddress()));
  addEventListener("online", () => shown.stream.status.kind === "waiting" && shown.stream.open());
  document.addEventListener("visibilitychange", () => document.hidden || refresh());
  setInterval(() => document.hidden || refresh(), REFRESH);
}

function sessionInAddress() {
  const session = new URLSearchParams(location.search).get("session");
  return session && api.isSessionName(session) ? session : null;
}

async function start() {
  listen();
  const config = await api.readConfig().catch((problem) => {
    view.showProblem(problem);
    return {};
  });
  shown.billing = config.billing ?? null;
  byId("usage-link").hidden = !config.billing;
  byId("change-key").hidden = !config.credentials;
  if (config.credentials && !(await findKey())) await askForKey();
  composer.offer(config.models ?? []);
  byId("question").focus();
  refresh();
  await enter(sessionInAddress());
}

await start();
