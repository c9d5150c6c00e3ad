// The web chat: one page that talks with the gateway over a WebSocket.
//
//   composer --> outbox --> send            the outbox survives a lost connection
//   log      <-- history, then turn events  the history is what is true
//   panel    <-- agents, sessions, bindings
//
// A turn is a question with all that answers it. Text of the model or of another
// person gets into the page only as textContent or through renderMarkdown().
//
// The parts, in this order: connection, turns, history, events, view, composer, start.
// Beside them: page.js has the state, markdown.js the answers, panel.js the routing.

import { patchChildren, renderMarkdown } from "./markdown.js";
import {
  byId,
  copyOf,
  focusText,
  isTouch,
  keyedButton,
  make,
  onButton,
  randomText,
  state,
} from "./page.js";
import {
  decidingTier,
  describeSession,
  isWide,
  refreshPanel,
  setPanel,
  showChat,
  showPanelIfWide,
  togglePanel,
} from "./panel.js";

const HISTORY_LIMIT = 200; // messages
const MAX_RETRY_SECONDS = 15;
const MAX_MESSAGE = 1_000_000; // bytes, somewhat less than the gateway takes
const NEAR_END = 32; // pixels from the end of the log that count as "at the end"

const turns = new Map(); // key of the question: the turn, in the order of the log
const page = byId("page");
const panel = byId("panel");
const scroller = byId("scroller");
const log = byId("log");
const composer = byId("composer");
const textField = byId("text");
const completions = byId("completions");

// --- connection ---

let socket = null;
let failedTries = 0;
let retryTimer = 0;
let lastRequest = 0;
const requests = new Map(); // id: what to do with the answer

export function isConnected() {
  return socket?.readyState === WebSocket.OPEN;
}

function connect() {
  clearTimeout(retryTimer);
  if (socket && socket.readyState !== WebSocket.CLOSED) {
    return;
  }
  socket = new WebSocket(socketAddress());
  let wasOpen = false;
  socket.onopen = () => {
    wasOpen = true;
    onConnected();
  };
  socket.onmessage = (message) => onFrame(JSON.parse(message.data));
  socket.onclose = () => onDisconnected(wasOpen);
}

function socketAddress() {
  const scheme = location.protocol === "https:" ? "wss:" : "ws:";
  const token = encodeURIComponent(state.token);
  return `${scheme}//${location.host}/ws?token=${token}`;
}

async function onConnected() {
  failedTries = 0;
  closeDoor();
  showConnection("connected");
  // Requests are answered in order, so the history knows of what is sent before it.
  sendOutbox();
  state.commands = await call("commands.list");
  showCompletions();
  await loadHistory();
  await refreshPanel();
}

async function onDisconnected(wasOpen) {
  for (const request of requests.values()) {
    request.reject(new ConnectionLost("the connection is lost"));
  }
  requests.clear();
  for (const turn of turns.values()) {
    turn.isLive = false; // pieces of its answer may be missed from now on
  }
  if (!wasOpen && (await isTokenRefused())) {
    askForToken();
    return;
  }
  showConnection("trying");
  const seconds = Math.min(0.5 * 2 ** failedTries, MAX_RETRY_SECONDS);
  failedTries += 1;
  retryTimer = setTimeout(connect, 1000 * seconds);
}

// A browser does not say why a WebSocket was refused; a plain request tells.
async function isTokenRefused() {
  try {
    const address = `/ws?token=${encodeURIComponent(state.token)}`;
    const response = await fetch(address, { cache: "no-store" });
    return response.status === 401;
  } catch {
    return false; // the gateway is not reachable at all
  }
}

function showConnection(name) {
  const texts = { connected: "Connected", trying: "Not connected" };
  byId("connection").dataset.state = name;
  byId("connection").textContent = texts[name];
  const banner = byId("banner");
  banner.hidden = name === "connected";
  banner.textContent = "The gateway is not reachable; trying again";
  for (const turn of turns.values()) {
    showTurnState(turn);
  }
  showTitle();
}

class ConnectionLost extends Error {}

// What a lost connection cuts off is asked for again on the next one.
window.addEventListener("unhandledrejection", (event) => {
  if (event.reason instanceof ConnectionLost) {
    event.preventDefault();
  } else {
    showNotice(`This did not work: ${event.reason.message}`);
  }
});

export function call(method, params = {}) {
  return new Promise((resolve, reject) => {
    if (!isConnected()) {
      reject(new ConnectionLost("the gateway is not reachable"));
      return;
    }
    lastRequest += 1;
    requests.set(lastRequest, { resolve, reject });
    const request = { jsonrpc: "2.0", method, params, id: lastRequest };
    socket.send(JSON.stringify(request));
  });
}

function onFrame(frame) {
  if (frame.method) {
    onEvent(frame.method, frame.params);
    return;
  }
  const request = requests.get(frame.id);
  requests.delete(frame.id);
  if (frame.error) {
    const error = new Error(frame.error.message);
    error.code = frame.error.code;
    request?.reject(error);
  } else {
    request?.resolve(frame.result);
  }
}

// The token

function takeTokenFromAddress() {
  const match = /[#&]token=([^&]*)/.exec(location.hash);
  if (!match) {
    return false;
  }
  useToken(decodeURIComponent(match[1]));
  // Otherwise it would stay in the history of the browser and in screenshots.
  history.replaceState(null, "", location.pathname);
  return true;
}

function useToken(token) {
  state.token = token;
  localStorage.setItem("token", token);
}

function askForToken() {
  page.hidden = true;
  setPanel(false);
  byId("door").hidden = false;
  const hadOne = state.token !== "";
  byId("door-error").textContent = hadOne ? "The gateway refuses this token." : "";
  byId("token").focus();
  document.title = "Web chat: link needed";
}

function closeDoor() {
  if (!byId("door").hidden) {
    byId("door").hidden = true;
    page.hidden = false;
    textField.focus();
  }
}

byId("door-form").addEventListener("submit", (event) => {
  event.preventDefault();
  const entry = byId("token").value.trim();
  const match = /[#&]token=([^&]*)/.exec(entry);
  useToken(match ? decodeURIComponent(match[1]) : entry);
  byId("token").value = "";
  connect();
});

// --- the log: turns ---

function messageKey(message) {
  return message.id || `${message.time}:${message.text}`; // the terminal has no ids
}

function findOrAddTurn(key, text, time) {
  const turn = turns.get(key) ?? addTurn(key, text);
  if (time) {
    turn.time = time;
  }
  return turn;
}

function addTurn(key, text) {
  const element = copyOf("turn-template");
  const part = (name) => element.querySelector(`.${name}`);
  const turn = {
    key,
    text,
    element,
    part,
    isOwn: key.startsWith(`web:${state.peer}:`),
    time: 0,
    state: "", // unsent, waiting, running, done, refused or unknown
    reason: "", // why it was refused
    isLive: false, // every piece of the answer since its beginning has arrived
    answers: [], // Markdown
    answerElement: null, // where the pieces go that arrive now
    renderTimer: 0,
    renderPause: 0, // milliseconds
    openCalls: [], // tool calls without a result
    hasTools: false,
    isStale: false, // the history has it better than it is shown
    notes: [], // texts
  };
  part("question-text").textContent = text;
  turns.set(key, turn);
  placeBeforeWaiting(element);
  return turn;
}

// What waits for its turn stands at the end.
function placeBeforeWaiting(element) {
  const waiting = log.querySelector(
    ':scope > [data-state="waiting"], :scope > [data-state="unsent"]',
  );
  log.insertBefore(element, waiting);
  byId("empty").hidden = true;
  byId("nothing").hidden = true;
}

function setTurnState(turn, name) {
  turn.state = name;
  if (name === "running") {
    state.running = turn;
  } else if (state.running === turn) {
    state.running = null;
  }
  showTurnState(turn);
  showTitle();
  showStopButton();
}

function showTurnState(turn) {
  const labels = {
    unsent: isConnected() ? "Sending" : "Not sent yet",
    waiting: "Waiting",
    refused: `Not taken: ${turn.reason}`,
    unknown: "Sent; there is no answer here yet",
  };
  turn.element.dataset.state = turn.state;
  const line = turn.part("question-state");
  line.replaceChildren(labels[turn.state] ?? "");
  if (turn.time && !labels[turn.state]) {
    line.append(timeElement(turn.time));
  }
  if (turn.state === "refused") {
    line.append(sendAgainButton());
  }
  const isRunning = turn.state === "running";
  turn.part("working").hidden = !isRunning;
  if (isRunning) {
    turn.part("answer").hidden = false;
    turn.part("speaker").textContent = speakerOf(turn);
    turn.part("working-text").textContent = workingText(turn);
  }
}

function isCommand(turn) {
  return turn.text.startsWith("/");
}

function speakerOf(turn) {
  return isCommand(turn) ? "gateway" : state.agent;
}

function workingText(turn) {
  if (!isConnected()) {
    return "Waiting for the gateway";
  }
  const call = turn.openCalls[0];
  if (call) {
    return `${state.agent} uses ${call.querySelector(".tool-name").textContent}`;
  }
  const isPartial = !turn.isLive && turn.answers.length > 0;
  const addition = isPartial ? "; this answer will be whole when it ends" : "";
  return `${speakerOf(turn)} is working${addition}`;
}

function sendAgainButton() {
  const button = make("button", "send-again text-button", "Send again");
  button.type = "button";
  return button;
}

function timeElement(seconds) {
  const date = new Date(1000 * seconds);
  const isToday = date.toDateString() === new Date().toDateString();
  const format = isToday
    ? { timeStyle: "short" }
    : { dateStyle: "medium", timeStyle: "short" };
  const element = make("time", "", date.toLocaleString(undefined, format));
  element.dateTime = date.toISOString();
  return element;
}

// The parts of an answer

function addPart(turn, element) {
  turn.part("answer").hidden = false;
  turn.part("speaker").textContent = speakerOf(turn);
  turn.part("parts").append(element);
}

function addAnswer(turn, text) {
  turn.answerElement = make("div", "text");
  turn.answers.push(text);
  addPart(turn, turn.answerElement);
  renderAnswer(turn);
}

function addAnswerPiece(turn, piece) {
  if (turn.answerElement) {
    turn.answers.push(turn.answers.pop() + piece);
    renderSoon(turn);
  } else if (piece.trim()) {
    addAnswer(turn, piece.trimStart());
  }
}

function endAnswerPart(turn) {
  if (turn.answerElement) {
    renderAnswer(turn);
  }
  turn.answerElement = null;
}

function renderAnswer(turn) {
  patchChildren(turn.answerElement, renderMarkdown(turn.answers.at(-1)));
}

// Pieces arrive faster than anybody reads. Rendering may take a fifth of the time.
function renderSoon(turn) {
  if (turn.renderTimer) {
    return;
  }
  turn.renderTimer = setTimeout(() => {
    turn.renderTimer = 0;
    const start = performance.now();
    if (turn.answerElement) {
      renderAnswer(turn);
    }
    turn.renderPause = Math.max(40, 4 * (performance.now() - start));
  }, turn.renderPause);
}

function addToolCall(turn, name, callArguments) {
  endAnswerPart(turn);
  const element = copyOf("tool-template");
  element.querySelector(".tool-name").textContent = name;
  element.querySelector(".tool-arguments").textContent = callArguments;
  element.querySelector(".tool-input").textContent = prettyJson(callArguments);
  turn.openCalls.push(element);
  turn.hasTools = true;
  addPart(turn, element);
}

function addToolResult(turn, text) {
  const element = turn.openCalls.shift(); // results come in the order of the calls
  if (element) {
    element.querySelector(".tool-result").textContent = text;
    const hasFailed = text.startsWith("error: ");
    element.querySelector(".tool-state").textContent = hasFailed ? "failed" : "done";
    element.classList.add(hasFailed ? "is-failed" : "is-done");
  }
}

function prettyJson(text) {
  try {
    return JSON.stringify(JSON.parse(text), null, 2);
  } catch {
    return text; // cut off, or no JSON
  }
}

function addNote(turn, text) {
  endAnswerPart(turn);
  turn.notes.push(text);
  const label = make("strong", "note-label", "Note");
  const note = make("div", "note", label, make("span", "", text));
  addPart(turn, note);
}

// The last note of a turn that has failed says why.
function markFailed(turn) {
  const note = [...turn.element.querySelectorAll(".note")].at(-1);
  note.classList.add("is-error");
  note.querySelector(".note-label").textContent = "Error";
  note.append(sendAgainButton());
}

function addCommandResult(turn, text) {
  const result = make("pre", "command-result", text);
  result.tabIndex = 0;
  addPart(turn, result);
}

function finishTurn(turn, time) {
  endAnswerPart(turn);
  turn.openCalls = [];
  turn.isLive = false;
  setTurnState(turn, "done");
  turn.part("answer-foot").hidden = turn.answers.length === 0;
  if (time) {
    turn.part("answer-time").replaceChildren(timeElement(time));
  }
}

// Show what the history has of a turn, in place of what was pieced together.
function fillTurn(turn, replies) {
  const parts = turn.part("parts");
  const openTools = [...parts.querySelectorAll(".tool")].map((tool) => tool.open);
  const notes = [...parts.querySelectorAll(".note")]; // the history has none
  parts.replaceChildren();
  turn.answers = [];
  turn.answerElement = null;
  turn.openCalls = [];
  for (const reply of replies) {
    addReply(turn, reply);
  }
  parts.append(...notes);
  parts.querySelectorAll(".tool").forEach((tool, index) => {
    tool.open = openTools[index] ?? false;
  });
}

function addReply(turn, reply) {
  if (reply.role === "tool") {
    addToolResult(turn, reply.text);
    return;
  }
  if (reply.text.trim()) {
    addAnswer(turn, reply.text.trim());
  }
  for (const call of reply.calls) {
    addToolCall(turn, call.name, call.arguments);
  }
}

function addDivider(text) {
  placeBeforeWaiting(make("h2", "divider", text));
}

// --- history ---

export async function loadHistory() {
  state.loads += 1;
  const load = state.loads;
  const which = state.reading ? { session: state.reading } : { peer: state.peer };
  const params = { ...which, limit: HISTORY_LIMIT };
  const history = await call("sessions.history", params);
  const isLatest = load === state.loads;
  if (isLatest) {
    showHistory(history);
  }
}

function showHistory(history) {
  beginConversation(history);
  const groups = groupTurns(history.messages);
  showGroups(groups, history.running);
  showWaiting(history.waiting);
  const running = turns.get(history.running);
  if (running && !running.isLive) {
    setTurnState(running, "running");
  }
  settleTurns(history, groups);
  showOutbox();
  showView();
}

function showGroups(groups, runningKey) {
  let previous = null;
  for (const [key, group] of groups) {
    const turn = findOrAddTurn(key, group.question.text, group.question.time);
    placeAfter(turn.element, previous);
    previous = turn.element;
    const isComplete = turn.state === "done" && !turn.isStale;
    if (!turn.isLive && !isComplete) {
      turn.isStale = false;
      fillTurn(turn, group.replies);
      if (key !== runningKey) {
        finishTurn(turn);
      }
    }
  }
}

function showWaiting(messages) {
  for (const message of messages) {
    const turn = findOrAddTurn(messageKey(message), message.text);
    const hasBegun = turn.isLive || turn.state === "done"; // events are faster
    if (!hasBegun) {
      log.append(turn.element);
      setTurnState(turn, "waiting");
    }
  }
}

// While the page was not connected, turns may have begun that it has in another order.
function placeAfter(element, previous) {
  const order = previous?.compareDocumentPosition(element);
  if (order & Node.DOCUMENT_POSITION_PRECEDING) {
    previous.after(element);
  }
}

// The history may be of the conversation that is shown ("same"), of one that /new has
// begun after it ("new"), or of any other.
function compareToShown(history) {
  if (history.session !== state.session) {
    return "other";
  }
  if (state.sessionId === "" || history.id === state.sessionId) {
    return "same";
  }
  return history.messages.length === 0 ? "new" : "other";
}

function beginConversation(history) {
  const kind = compareToShown(history);
  if (kind === "other") {
    clearLog();
    showBeginning(history);
  } else if (kind === "new" || history.label !== state.label) {
    addDivider(`New conversation: ${history.label}`.replace(/: $/, ""));
  }
  state.session = history.session;
  state.sessionId = history.id;
  state.label = history.label;
  state.agent = history.agent;
}

function clearLog() {
  log.replaceChildren();
  turns.clear();
  state.running = null;
  state.isAtEnd = true;
}

function showBeginning(history) {
  if (history.messages.length >= HISTORY_LIMIT) {
    addDivider("Older messages are not shown");
  }
  if (history.label) {
    addDivider(history.label);
  }
}

function groupTurns(messages) {
  const groups = new Map();
  let group = null; // none before the first question: the limit has cut it off
  for (const message of messages) {
    if (message.role === "user") {
      group = { question: message, replies: [] };
      let key = messageKey(message);
      while (groups.has(key)) {
        key += "+"; // the same words again, of an old session without ids
      }
      groups.set(key, group);
    } else {
      group?.replies.push(message);
    }
  }
  return groups;
}

// A turn may have ended while the page was not connected, without an answer.
function settleTurns(history, groups) {
  const known = new Set(history.waiting.map(messageKey));
  known.add(history.running);
  for (const [key, turn] of turns) {
    const isOpen = turn.state === "waiting" || turn.state === "running";
    if (isOpen && !turn.isLive && !known.has(key) && !groups.has(key)) {
      setTurnState(turn, "unknown");
    }
  }
}

// --- events ---

function onEvent(name, event) {
  if (event.session !== state.session) {
    onOtherSession(name, event);
    return;
  }
  if (name === "turn.begin") {
    beginTurn(event);
  } else if (name === "turn.end") {
    endTurn(event);
  } else if (state.running) {
    addToTurn(state.running, name, event.text);
  }
}

function onOtherSession(name, event) {
  const isOwn = event.id?.startsWith(`web:${state.peer}:`);
  if (isOwn && !state.reading && name === "turn.begin") {
    loadHistory(); // a binding has changed: this chat has another session now
  }
  if (isOwn && state.reading && name === "turn.end") {
    byId("back").textContent = "Back to my chat: there is an answer";
  }
}

function beginTurn(event) {
  const turn = findOrAddTurn(messageKey(event), event.text, event.time);
  turn.isLive = true;
  // After a restart of the gateway, a turn begins once more and goes on.
  turn.isStale = turn.part("parts").childElementCount > 0;
  endAnswerPart(turn);
  turn.notes = [];
  setTurnState(turn, "running");
  placeBeforeWaiting(turn.element);
}

function addToTurn(turn, name, text) {
  if (name === "turn.answer") {
    addAnswerPiece(turn, text);
  } else if (name === "turn.tool_call") {
    const [toolName, ...rest] = text.split(" ");
    addToolCall(turn, toolName, rest.join(" "));
  } else if (name === "turn.tool_result") {
    addToolResult(turn, text);
  } else if (name === "turn.note") {
    addNote(turn, text);
  }
  showTurnState(turn);
}

function endTurn(event) {
  const turn = turns.get(event.id) ?? state.running;
  if (!turn) {
    loadHistory();
    return;
  }
  // Tool calls are shown shortened while they run; the history has them whole.
  turn.isStale ||= turn.hasTools || !turn.isLive;
  completeAnswer(turn, event.text);
  finishTurn(turn, Date.now() / 1000);
  announceAnswer(turn);
  countUnread();
  if (turn.isStale || event.session_id !== state.sessionId) {
    loadHistory();
  }
  refreshPanel();
}

// The end of a turn brings the whole answer, or the notes that say why there is none.
function completeAnswer(turn, text) {
  endAnswerPart(turn);
  const hasFailed = turn.notes.length > 0 && text === turn.notes.join("\n");
  const isMissing = text && turn.answers.length === 0;
  if (hasFailed) {
    markFailed(turn);
  } else if (isMissing && isCommand(turn)) {
    addCommandResult(turn, text);
  } else if (isMissing) {
    addAnswer(turn, text);
  }
}

// --- the view: title, place in the log, announcements ---

export function showView() {
  const where = describeSession(state.session);
  const tier = `routed by the ${decidingTier().name} tier`;
  const about = [state.label, state.reading ? where.detail : tier];
  byId("title").textContent = state.reading ? where.name : state.agent;
  byId("subtitle").textContent = about.filter(Boolean).join(", ");
  byId("empty-agent").textContent = state.agent;
  textField.placeholder = `Message ${state.agent}`;
  byId("empty").hidden = turns.size > 0 || state.reading !== "";
  byId("nothing").hidden = turns.size > 0 || state.reading === "";
  byId("reading").hidden = !state.reading;
  byId("reading-name").textContent = `${where.name}, agent ${state.agent}`;
  composer.hidden = state.reading !== "";
  byId("new").hidden = state.reading !== "";
  showTitle();
  showStopButton();
}

function showTitle() {
  const name = state.agent ? `${state.agent} - web chat` : "Web chat";
  if (state.unread > 0) {
    document.title = `(${state.unread}) ${name}`;
  } else if (!isConnected()) {
    document.title = `Not connected: ${name}`;
  } else if (state.running) {
    document.title = `Working: ${name}`;
  } else {
    document.title = name;
  }
}

function countUnread() {
  if (document.hidden) {
    state.unread += 1;
    showTitle();
  }
}

document.addEventListener("visibilitychange", () => {
  if (!document.hidden) {
    state.unread = 0;
    showTitle();
    if (!isConnected() && state.token) {
      connect();
    }
  }
});

// The log follows its end while the reader is there; else it stays where it is.

let lastTop = 0; // where the log was at the last look

function scrollToEnd() {
  scroller.scrollTop = scroller.scrollHeight;
  checkPlace();
}

// Only a reader moves the log up. (New text also leaves the end behind for a moment.)
function checkPlace() {
  const top = scroller.scrollTop;
  const rest = scroller.scrollHeight - top - scroller.clientHeight;
  if (rest < NEAR_END) {
    state.isAtEnd = true;
  } else if (top < lastTop) {
    state.isAtEnd = false;
  }
  lastTop = top;
  byId("jump").hidden = state.isAtEnd;
}

scroller.addEventListener("scroll", checkPlace);

const sizes = new ResizeObserver(() => {
  if (state.isAtEnd) {
    scrollToEnd();
  } else {
    checkPlace();
  }
});
sizes.observe(log);
sizes.observe(scroller);

// Whoever unfolds a tool call wants to read it, and not what is below it.
log.addEventListener("click", (event) => {
  if (event.target.closest("summary")) {
    state.isAtEnd = false;
  }
});

byId("jump").addEventListener("click", () => {
  scrollToEnd();
  focusText();
});

// A screen reader gets whole messages, not each piece of a stream.
function announce(text) {
  byId("announcer").textContent = text;
}

// The words of it: no buttons, and no arguments and results of tools.
function announceAnswer(turn) {
  const parts = turn.part("parts").querySelectorAll(
    ".text > :not(.code-frame), .code-frame pre, .note > :not(button), .command-result",
  );
  const texts = Array.from(parts, (part) => part.innerText);
  announce(`${speakerOf(turn)}: ${texts.join("\n")}`);
}

// A notice may offer an action, such as Undo, which then has the focus.

const notice = byId("notice");
let noticeTimer = 0;
let focusedBefore = null;

export function showNotice(text, actionName, action) {
  hideNotice();
  notice.replaceChildren(text);
  notice.hidden = false;
  announce(text);
  if (action) {
    const button = make("button", "text-button", actionName);
    button.type = "button";
    button.addEventListener("click", () => {
      hideNotice();
      action();
    });
    notice.append(button);
    focusedBefore = document.activeElement;
    button.focus();
  }
  noticeTimer = setTimeout(hideNotice, action ? 12_000 : 5000);
}

function hideNotice() {
  clearTimeout(noticeTimer);
  const hadFocus = notice.contains(document.activeElement);
  notice.hidden = true;
  if (hadFocus) {
    focusedBefore.focus();
  }
}

onButton(log, (button) => {
  const turn = [...turns.values()].find((each) => each.element.contains(button));
  if (button.matches(".copy-code")) {
    const block = button.closest(".code-frame").querySelector("pre");
    copy(block.textContent, button, "Copy");
  } else if (button.matches(".copy-answer")) {
    copy(turn.answers.join("\n\n"), button, "Copy answer");
  } else if (button.matches(".send-again")) {
    sendAgain(turn);
  }
});

async function copy(text, button, label) {
  try {
    await navigator.clipboard.writeText(text);
  } catch (error) {
    showNotice(`Not copied: ${error.message}`);
    return;
  }
  button.textContent = "Copied";
  announce("Copied");
  setTimeout(() => {
    button.textContent = label;
  }, 1500);
}

// --- composer: sending ---

// Messages that the gateway has not taken yet. All tabs share them. The gateway
// accepts an id once, so a message may be sent again when in doubt.
function readOutbox() {
  return JSON.parse(localStorage.getItem("outbox") ?? "[]");
}

function changeOutbox(change) {
  localStorage.setItem("outbox", JSON.stringify(change(readOutbox())));
}

function say(text) {
  const entry = { id: randomText(12), text };
  changeOutbox((entries) => [...entries, entry]);
  hideNotice();
  state.isAtEnd = true;
  showOutbox();
  deliver(entry);
}

function showOutbox() {
  if (state.reading) {
    return;
  }
  for (const entry of readOutbox()) {
    const turn = findOrAddTurn(outboxKey(entry), entry.text);
    if (["", "unsent"].includes(turn.state)) {
      setTurnState(turn, "unsent");
      log.append(turn.element);
    }
  }
}

function outboxKey(entry) {
  return `web:${state.peer}:${entry.id}`;
}

function sendOutbox() {
  readOutbox().forEach(deliver);
}

async function deliver(entry) {
  const params = { text: entry.text, peer: state.peer, id: entry.id };
  try {
    const result = await call("send", params);
    forget(entry);
    onAccepted(entry, result);
  } catch (error) {
    const isRefused = error.code !== undefined; // else the connection was lost
    if (isRefused) {
      forget(entry);
      onRefused(entry, error.message);
    }
  }
}

function forget(entry) {
  changeOutbox((entries) => entries.filter((other) => other.id !== entry.id));
}

function onAccepted(entry, result) {
  const turn = turns.get(outboxKey(entry));
  if (turn?.state === "unsent") {
    setTurnState(turn, "waiting");
  }
  if (!state.reading && state.session && result.session !== state.session) {
    loadHistory();
  }
}

function onRefused(entry, reason) {
  const turn = turns.get(outboxKey(entry));
  if (turn) {
    turn.reason = reason;
    setTurnState(turn, "refused");
  }
}

function sendAgain(turn) {
  focusText(); // the button goes
  turn.part("send-again").remove();
  if (turn.state === "refused") {
    turn.element.remove();
    turns.delete(turn.key);
  }
  say(turn.text);
}

function isTooLong(text) {
  return new TextEncoder().encode(JSON.stringify(text)).length > MAX_MESSAGE;
}

function showStopButton() {
  const canStop = state.commands.some((command) => nameOf(command) === "/stop");
  byId("stop").hidden = !(canStop && state.running && !state.reading);
}

byId("stop").addEventListener("click", () => say("/stop"));
byId("new").addEventListener("click", () => {
  say("/new");
  focusText();
});

composer.addEventListener("submit", (event) => {
  event.preventDefault();
  const text = textField.value.trim();
  if (isTooLong(text)) {
    showNotice("This is too long for one message. Put it into a file instead.");
  } else if (text) {
    say(text);
    setText("");
  }
  textField.focus();
});

// --- composer: typing ---

function setText(text) {
  textField.value = text;
  onTyped();
}

function onTyped() {
  localStorage.setItem("draft", textField.value);
  byId("send").disabled = textField.value.trim() === "";
  textField.style.height = "auto";
  textField.style.height = `${textField.scrollHeight}px`;
  showCompletions();
  showHint();
}

const KEYS = byId("keys").textContent;

// What may follow the command that is being typed.
function showHint() {
  const name = textField.value.split(/\s/)[0];
  const command = state.commands.find((each) => nameOf(each) === name);
  byId("keys").textContent = command ? `${command.usage}: ${command.about}` : KEYS;
}

textField.addEventListener("input", onTyped);

// An Enter that ends a word of an input method does not send.
function isComposing(event) {
  return event.isComposing || event.keyCode === 229;
}

textField.addEventListener("keydown", (event) => {
  if (isComposing(event) || onCompletionKey(event)) {
    return;
  }
  const handlers = {
    Enter: sendOnEnter,
    ArrowUp: recall,
    ArrowDown: recall,
    PageUp: scrollLog,
    PageDown: scrollLog,
  };
  handlers[event.key]?.(event);
});

function sendOnEnter(event) {
  const wantsLine = event.shiftKey || (isTouch() && !event.ctrlKey);
  if (!wantsLine) {
    event.preventDefault();
    composer.requestSubmit();
  }
}

function scrollLog(event) {
  const direction = event.key === "PageUp" ? -1 : 1;
  scroller.scrollBy(0, direction * 0.8 * scroller.clientHeight);
}

// ArrowUp in an empty field brings back the last message, and then those before it.
function recall(event) {
  const own = [...turns.values()].filter((turn) => turn.isOwn);
  const texts = [...new Set(["", ...own.map((turn) => turn.text).reverse()])];
  const position = texts.indexOf(textField.value);
  const isRecalled = position === 0 || textField.value === state.recalled;
  const next = position + (event.key === "ArrowUp" ? 1 : -1);
  if (isRecalled && next >= 0 && next < texts.length) {
    event.preventDefault();
    state.recalled = texts[next];
    setText(texts[next]);
  }
}

// Completion of commands

function nameOf(command) {
  return command.usage.split(" ")[0];
}

function matchingCommands() {
  const text = textField.value;
  const isTypingName = /^\/\S*$/.test(text);
  const isName = state.commands.some((command) => nameOf(command) === text);
  if (!isTypingName || isName) {
    return [];
  }
  return state.commands.filter((command) => nameOf(command).startsWith(text));
}

function showCompletions() {
  const options = matchingCommands().map((command, index) => {
    const usage = make("span", "usage", command.usage);
    const option = make("li", "", usage, make("span", "about", command.about));
    option.id = `completion-${index}`;
    option.role = "option";
    option.dataset.name = nameOf(command);
    return option;
  });
  showOptions(options);
}

function showOptions(options) {
  completions.replaceChildren(...options);
  completions.hidden = options.length === 0;
  chooseOption(options[0]);
}

function chosenOption() {
  return completions.querySelector('[aria-selected="true"]');
}

function chooseOption(option) {
  for (const each of completions.children) {
    each.ariaSelected = String(each === option);
  }
  if (option) {
    textField.setAttribute("aria-activedescendant", option.id);
    option.scrollIntoView({ block: "nearest" });
  } else {
    textField.removeAttribute("aria-activedescendant");
  }
}

// Whether a key was meant for the list of commands.
function onCompletionKey(event) {
  const option = chosenOption();
  if (!option || event.shiftKey) {
    return false;
  }
  if (event.key === "ArrowDown") {
    chooseOption(option.nextElementSibling ?? completions.firstElementChild);
  } else if (event.key === "ArrowUp") {
    chooseOption(option.previousElementSibling ?? completions.lastElementChild);
  } else if (event.key === "Enter" || event.key === "Tab") {
    complete(option);
  } else if (event.key === "Escape") {
    showOptions([]);
  } else {
    return false;
  }
  event.preventDefault();
  return true;
}

function complete(option) {
  const command = state.commands.find((each) => nameOf(each) === option.dataset.name);
  const takesMore = command.usage !== nameOf(command);
  setText(takesMore ? `${nameOf(command)} ` : nameOf(command));
  textField.focus();
}

completions.addEventListener("pointerdown", (event) => {
  event.preventDefault(); // the focus stays in the field
  const option = event.target.closest("li");
  if (option) {
    complete(option);
  }
});

// --- start ---

// Escape leaves what is open, and leads to the message field.
document.addEventListener("keydown", (event) => {
  if (event.key !== "Escape" || event.defaultPrevented) {
    return;
  }
  if (notice.contains(document.activeElement)) {
    hideNotice();
  } else if (!panel.hidden && !isWide()) {
    togglePanel(false);
  } else if (state.reading) {
    showChat();
  } else if (!page.hidden) {
    textField.focus();
  }
});

const THEMES = { auto: "as the system", light: "light", dark: "dark" };

function setTheme(name) {
  localStorage.setItem("theme", name);
  document.documentElement.dataset.theme = name;
  byId("theme").setAttribute("aria-label", `Colours: ${THEMES[name]}`);
  byId("theme").title = `Colours: ${THEMES[name]}`;
}

byId("theme").addEventListener("click", () => {
  const names = Object.keys(THEMES);
  const position = names.indexOf(document.documentElement.dataset.theme);
  setTheme(names[(position + 1) % names.length]);
});

const SUGGESTIONS = [
  "What can you do?",
  "Write buy milk into notes.txt",
  "What is in SOUL.md?",
  "/agents",
];

for (const text of SUGGESTIONS) {
  byId("suggestions").append(make("li", "", keyedButton("suggestion", text, text)));
}

onButton(byId("suggestions"), (button) => {
  say(button.dataset.key);
  focusText();
});

window.addEventListener("online", connect);
window.addEventListener("hashchange", () => {
  if (takeTokenFromAddress()) {
    socket?.close();
    connect();
  }
});

setTheme(localStorage.getItem("theme") ?? "auto");
showPanelIfWide();
setText(localStorage.getItem("draft") ?? "");
showOutbox();
takeTokenFromAddress();
if (state.token) {
  connect();
  focusText();
} else {
  askForToken();
}
