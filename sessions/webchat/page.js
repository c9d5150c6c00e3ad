// What all modules of the page share: its state, and helpers for its elements.

// --- state ---

export const state = {
  token: localStorage.getItem("token") ?? "",
  peer: localStorage.getItem("peer") ?? newPeer(),
  session: "", // the key of the session that is shown
  sessionId: "", // changes with /new and /switch
  label: "", // of that session
  agent: "",
  reading: "", // the key of another session while that one is shown
  ownSession: "", // the key of this chat's session meanwhile
  running: null, // the turn that is being answered
  isAtEnd: true, // whether the log follows what is new
  unread: 0, // answers that came while the page was hidden
  loads: 0, // histories asked for so far
  recalled: "", // the message that ArrowUp has brought back
  agents: [],
  sessions: [],
  bindings: [],
  commands: [],
};

function newPeer() {
  const peer = `browser-${randomText(6)}`;
  localStorage.setItem("peer", peer);
  return peer;
}

export function randomText(length) {
  const letters = "abcdefghijklmnopqrstuvwxyz0123456789";
  const numbers = crypto.getRandomValues(new Uint8Array(length));
  return Array.from(numbers, (number) => letters[number % 36]).join("");
}

// --- elements ---

export const byId = (id) => document.getElementById(id);

export function make(tag, className, ...children) {
  const element = document.createElement(tag);
  element.className = className;
  element.append(...children);
  return element;
}

export function onButton(list, handle) {
  list.addEventListener("click", (event) => {
    const button = event.target.closest("button");
    if (button) {
      handle(button);
    }
  });
}

export function copyOf(templateId) {
  return byId(templateId).content.firstElementChild.cloneNode(true);
}

// A button of a list. The key tells it from the others, also when they are made anew.
export function keyedButton(className, key, ...children) {
  const button = make("button", className, ...children);
  button.type = "button";
  button.dataset.key = key;
  return button;
}

// --- touch ---

// A phone has no Shift+Enter, and a keyboard that covers half of the page.
export function isTouch() {
  return matchMedia("(pointer: coarse)").matches;
}

export function focusText() {
  if (!isTouch()) {
    byId("text").focus();
  }
}
