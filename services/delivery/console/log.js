// The log of a session as this page has read it: the acceptance rule and the fold into generations.
// Pure: no input or output, no clock, no DOM.

const TERMINALS = new Set(["completed", "failed", "cancelled", "interrupted"]);
const TAKEOVERS = new Set([...TERMINALS, "restarted"]);
export const BEGINNING = Object.freeze({ epoch: 0, nextSeq: 0, ended: false });

/**
 * The one acceptance rule of every reader. Returns the position after the event and the verdict:
 * `accepted`, `duplicate`, `gap`, `zombie` or `ended`. The position is the same object unless accepted.
 */
export function judge(position, type, epoch, seq) {
  if (epoch < position.epoch) return [position, "zombie"];
  if (seq < position.nextSeq) return [position, "duplicate"];
  if (position.ended && type !== "usage") return [position, "ended"];
  if (seq > position.nextSeq) return [position, "gap"];
  if (epoch > position.epoch && seq > 0 && !TAKEOVERS.has(type)) return [position, "zombie"];
  return [{ epoch, nextSeq: seq + 1, ended: position.ended || TERMINALS.has(type) }, "accepted"];
}

/** Return a log of which nothing has been read. `verdicts` counts what was dropped, by reason. */
export const emptyLog = () => ({
  generations: new Map(),
  received: 0,
  verdicts: { duplicate: 0, gap: 0, zombie: 0, ended: 0 },
  unknown: 0,
});

const newGeneration = (name) => ({
  name,
  position: BEGINNING,
  read: 0, // events accepted
  resync: true, // adopt the next event's seq: the first one, or the first after a gap that was announced
  truncated: false,
  order: 0,
  state: "queued",
  model: "",
  provider: "",
  upstreamModel: "",
  prompt: null,
  take: 0, // counts up when what was shown has to be forgotten
  parts: [],
  tokens: 0,
  counted: null,
  reported: null,
  notices: [],
  reason: null,
  code: null,
  message: "",
  recoverable: false,
  startedAt: 0,
  firstAt: 0,
  lastAt: 0,
});

function generationOf(log, name) {
  let generation = log.generations.get(name);
  if (!generation) {
    generation = newGeneration(name);
    log.generations.set(name, generation);
  }
  return generation;
}

/** Whether the generation has its terminal. */
export const isEnded = (generation) => TERMINALS.has(generation.state);

/** Read one event; returns the generation it changed, or null when the event was dropped. */
export function accept(log, event) {
  log.received += 1;
  const { generation: name, seq, type, epoch = 1 } = event;
  const generation = generationOf(log, name);
  if (generation.resync && seq > generation.position.nextSeq) {
    // What lies before is no longer kept (or was announced as lost): go on from here, and say so.
    generation.truncated = true;
    generation.position = { ...generation.position, epoch, nextSeq: seq };
  }
  const [position, verdict] = judge(generation.position, type, epoch, seq);
  if (verdict !== "accepted") {
    log.verdicts[verdict] += 1;
    return null;
  }
  generation.position = position;
  generation.resync = false;
  generation.read += 1;
  generation.order ||= event.at ?? 0;
  const fold = FOLDS[type];
  if (fold) fold(generation, event);
  else log.unknown += 1;
  return generation;
}

/** The server said that events are lost here: each running generation goes on with whatever comes next. */
export function announceGap(log) {
  for (const generation of log.generations.values()) {
    if (!generation.position.ended) generation.resync = true;
  }
}

/** Note a generation that was asked for, before its first event. */
export function expect(log, name, { model, prompt }) {
  const generation = generationOf(log, name);
  // After all that is shown: this machine's clock does not take part, it may be wrong.
  generation.order ||= Math.max(0, ...[...log.generations.values()].map(({ order }) => order)) + 0.001;
  generation.model ||= model;
  generation.prompt ??= prompt;
  return generation;
}

/** Take in a look-up record. The log is the truth: where events were read, the record adds nothing. */
export function merge(log, record) {
  const generation = generationOf(log, record.generation);
  generation.order = record.created_at ?? generation.order;
  generation.prompt ??= record.metadata?.prompt ?? null;
  generation.model ||= record.model ?? "";
  if (generation.read > 0) return generation;
  generation.state = record.state;
  generation.provider = record.provider ?? "";
  generation.upstreamModel = record.upstream_model ?? "";
  generation.counted = record.counted ?? null;
  generation.tokens = record.counted?.output ?? 0;
  generation.reported = record.usage ?? null;
  generation.code = record.code ?? null;
  generation.reason = record.finish_reason ?? null;
  return generation;
}

/**
 * Return the conversation so far as messages, oldest first: each question that has an answer, with its answer;
 * the newest turns that fit into `limit` characters, as a request's body is bounded.
 */
export function conversation(log, limit = 200_000) {
  const messages = [];
  let left = limit;
  for (const turn of [...log.generations.values()].sort((a, b) => b.order - a.order)) {
    const text = answerText(turn);
    if (!turn.prompt || !text || !isEnded(turn)) continue;
    left -= turn.prompt.length + text.length;
    if (left < 0) break;
    messages.unshift({ role: "user", content: turn.prompt }, { role: "assistant", content: text });
  }
  return messages;
}

/** Return the text of one of the alternative answers, joined: what the model says, or how it refuses. */
export const answerText = (generation, choice = 0) =>
  generation.parts
    .filter((part) => (part.kind === "text" || part.kind === "refusal") && part.choice === choice)
    .map((part) => part.text)
    .join("");

const FOLDS = {
  started(generation, event) {
    Object.assign(generation, {
      state: generation.state === "cancelling" ? "cancelling" : "running",
      model: event.model,
      provider: event.provider,
      upstreamModel: event.upstream_model,
      counted: event.counted ?? null,
      startedAt: event.at ?? 0,
      tokens: 0, // a look-up record may have told the end before the log tells the way
      reported: null,
      code: null,
      reason: null,
    });
    generation.prompt ??= event.metadata?.prompt ?? null;
  },
  delta(generation, event) {
    // A cancel that is on its way keeps its word; everything else that emits tokens is running.
    if (generation.state === "queued") generation.state = "running";
    generation.tokens = Math.max(generation.tokens, event.tokens ?? 0);
    generation.firstAt ||= event.at ?? 0;
    generation.lastAt = event.at ?? generation.lastAt;
    append(generation.parts, event);
  },
  notice(generation, event) {
    generation.notices.push({ code: event.code, message: event.message ?? "", delay: event.delay ?? null });
  },
  restarted(generation, event) {
    Object.assign(generation, { state: "running", parts: [], tokens: 0, firstAt: 0, lastAt: 0, truncated: false });
    generation.take += 1;
    generation.provider = event.provider || generation.provider;
    generation.upstreamModel = event.upstream_model || generation.upstreamModel;
    generation.notices.push({ code: "restarted", message: event.reason, delay: null });
  },
  usage(generation, event) {
    if (!event.call) generation.reported = event.usage; // with a call it is about one that was abandoned
  },
  completed: (generation, event) => end(generation, event, { reason: event.finish_reason ?? "stop" }),
  failed: (generation, event) =>
    end(generation, event, {
      code: event.code,
      message: event.message ?? "",
      recoverable: event.recoverable ?? false,
    }),
  cancelled: (generation, event) => end(generation, event, { code: event.reason ?? "requested" }),
  interrupted: (generation, event) => end(generation, event, { code: event.reason ?? "producer_lost" }),
};

function end(generation, event, fields) {
  Object.assign(generation, { state: event.type, ...fields });
  generation.lastAt ||= event.at ?? 0;
  if (event.counted) {
    generation.counted = event.counted;
    generation.tokens = event.counted.output ?? 0;
  }
}

function append(parts, { choice = 0, text, reasoning, refusal, tool_call: call, binary, annotation, extra }) {
  if (call) return appendCall(parts, choice, call);
  if (binary) return appendBinary(parts, choice, binary);
  if (annotation) return appendSource(parts, choice, annotation);
  if (extra) {
    parts.push({ kind: "extra", choice, name: extra.kind, data: extra.data ?? null });
    return undefined;
  }
  const kind = refusal !== undefined ? "refusal" : reasoning !== undefined ? "reasoning" : "text";
  const added = refusal ?? reasoning ?? text ?? "";
  const open = parts.findLast((part) => part.choice === choice);
  if (open?.kind === kind) open.text += added;
  else if (added) parts.push({ kind, choice, text: added });
  return undefined;
}

/** Join the pieces of a file; each is base64 of its own. */
function appendBinary(parts, choice, { media_type: mediaType, data, continues = false }) {
  const open = continues ? parts.findLast((part) => part.kind === "binary" && part.choice === choice) : null;
  if (open) open.pieces.push(data);
  else parts.push({ kind: "binary", choice, mediaType, pieces: [data] });
}

/** Sources of a choice stand together, at the place of the first one. */
function appendSource(parts, choice, { kind, url = null, title = null, quote = null, number = null }) {
  const source = { kind, url, title, quote, number };
  const open = parts.find((part) => part.kind === "sources" && part.choice === choice);
  if (open) open.sources.push(source);
  else parts.push({ kind: "sources", choice, sources: [source] });
}

function appendCall(parts, choice, { index = 0, id, name, arguments: added = "" }) {
  let call = parts.find((part) => part.kind === "tool" && part.choice === choice && part.index === index);
  if (!call) {
    call = { kind: "tool", choice, index, id: null, name: null, arguments: "" };
    parts.push(call);
  }
  call.id ??= id ?? null;
  call.name ??= name ?? null;
  call.arguments += added;
}
