// The side panel: which binding leads this chat to which agent, and the sessions.
//
//   agents.list, sessions.list, bindings.list --> refreshPanel --> showPanel
//   bindings.set, bindings.remove             <-- what the person clicks

import { byId, focusText, keyedButton, make, onButton, state } from "./page.js";
// Each of the two modules uses the other, but not before both are loaded.
import { call, isConnected, loadHistory, showNotice, showView } from "./webchat.js";

const PANEL_SECONDS = 5; // between two looks at what others may have changed
const page = byId("page");
const panel = byId("panel");

// --- the tiers ---

// The narrowest first. `fits` says whether a binding of the tier is for this chat.
const TIERS = [
  {
    name: "peer",
    fits: (binding) => isOfWebAccount(binding) && binding.peer === state.peer,
  },
  { name: "guild", fits: () => false }, // web chats have none
  {
    name: "account",
    fits: (binding) => binding.channel === "web" && binding.account === "default",
  },
  { name: "channel", fits: (binding) => binding.channel === "web" },
  { name: "default", fits: () => true },
];

function isOfWebAccount(binding) {
  const isAccount = ["", "default"].includes(binding.account);
  return binding.channel === "web" && isAccount && binding.guild === "";
}

// The binding of a tier for this chat, if there is one.
function bindingOf(tier) {
  const found = state.bindings.filter(
    (binding) => binding.tier === tier.name && tier.fits(binding),
  );
  return found.toSorted(byRank)[0];
}

// The highest priority is the first; then the binding with the most fields.
function byRank(one, other) {
  if (one.priority !== other.priority) {
    return other.priority - one.priority;
  }
  return fieldsOf(other).length - fieldsOf(one).length;
}

function fieldsOf(binding) {
  const names = ["channel", "account", "peer", "guild"];
  return names.filter((name) => binding[name]);
}

export function decidingTier() {
  return TIERS.find(bindingOf) ?? TIERS.at(-1);
}

function decidingAgent() {
  return bindingOf(decidingTier())?.agent ?? "main";
}

// --- what it shows ---

export async function refreshPanel() {
  if (!isConnected()) {
    return;
  }
  const methods = ["agents.list", "sessions.list", "bindings.list"];
  const answers = await Promise.all(methods.map((method) => call(method)));
  [state.agents, state.sessions, state.bindings] = answers;
  if (!state.reading && decidingAgent() !== state.agent) {
    await loadHistory(); // a binding of this chat has changed
  }
  showPanel();
  showView();
}

function showPanel() {
  byId("peer-name").textContent = state.peer;
  replaceList(byId("agents"), state.agents.map(agentItem));
  replaceList(byId("tiers"), TIERS.map(tierItem));
  const latest = state.sessions.toSorted((one, other) => other.used - one.used);
  replaceList(byId("sessions"), latest.map(sessionItem));
  const none = make("li", "hint", "None: every message goes to main.");
  const bindings = state.bindings.map(bindingItem);
  replaceList(byId("bindings"), bindings.length > 0 ? bindings : [none]);
  byId("unbind").hidden = !bindingOf(TIERS[0]);
  const select = byId("binding-form").elements.agent;
  const names = state.agents.map((agent) => agent.id);
  if (select.options.length !== names.length) {
    select.replaceChildren(...names.map((name) => new Option(name)));
  }
}

// Replace the items of a list, unless they are the same. The focus stays.
function replaceList(list, items) {
  const isSame =
    list.children.length === items.length &&
    items.every((item, index) => item.isEqualNode(list.children[index]));
  if (isSame) {
    return;
  }
  const focused = list.contains(document.activeElement);
  const focusedKey = document.activeElement.dataset.key;
  list.replaceChildren(...items);
  if (focused) {
    const buttons = [...list.querySelectorAll("button")];
    const same = buttons.find((button) => button.dataset.key === focusedKey);
    (same ?? buttons[0] ?? byId("panel-close")).focus();
  }
}

function agentItem(agent) {
  const name = make("span", "name", agent.id);
  const about = [agent.model, agent.prompt].filter(Boolean).join(": ");
  const detail = make("span", "detail", about || "the default prompt and model");
  const button = keyedButton("row", agent.id, name, detail);
  button.setAttribute("aria-pressed", String(agent.id === decidingAgent()));
  return make("li", "", button);
}

function tierItem(tier) {
  const binding = bindingOf(tier);
  const isDeciding = tier === decidingTier();
  const agent = binding?.agent ?? (tier.name === "default" ? "main" : "no binding");
  const name = make("span", "name", tier.name);
  const item = make("li", "tier", name, make("span", "", agent));
  if (isDeciding) {
    item.classList.add("is-deciding");
    item.append(make("span", "badge", "decides"));
  }
  return item;
}

function sessionItem(entry) {
  const where = describeSession(entry.session);
  const name = make("span", "name", `${where.name}, ${entry.agent}`);
  const about = [where.detail, entry.label].filter(Boolean).join(", ");
  const detail = make("span", "detail", about);
  const button = keyedButton("row", entry.session, name, detail);
  button.setAttribute("aria-current", String(entry.session === state.session));
  return make("li", "", button);
}

// A session key is agent:<id>:main, or agent:<id>:<where>:direct|group:<peer>.
export function describeSession(key) {
  const rest = key.split(":").slice(2).join(":");
  const match = /^(?:(.*):)?(direct|group):(.*)$/.exec(rest);
  if (!match) {
    return { name: "Terminal", detail: "where the gateway runs" };
  }
  const [, where, kind, peer] = match;
  const place = (where ?? "all channels").replace(":default", "").replace(":", " ");
  const name = peer === state.peer ? "This browser" : peer;
  return { name, detail: `${place} ${kind}` };
}

function bindingItem(binding, index) {
  const { agent, tier, priority } = binding;
  const parts = fieldsOf(binding).map((name) => `${name} ${binding[name]}`);
  if (priority) {
    parts.push(`priority ${priority}`);
  }
  const what = parts.join(", ") || "everything";
  const remove = keyedButton("icon-button remove", `remove ${what}`, "×");
  remove.setAttribute("aria-label", `Remove the binding of ${what} to ${agent}`);
  remove.dataset.index = index;
  const text = make("span", "binding-text", `${what} → `, make("strong", "", agent));
  return make("li", "binding", make("span", "badge", tier), text, remove);
}

// --- what it changes ---

function withoutTier(binding) {
  const fields = { ...binding };
  delete fields.tier;
  return fields;
}

async function changeBindings(method, binding) {
  try {
    await call(method, { binding });
  } catch (error) {
    showNotice(`Not changed: ${error.message}`);
    return false;
  }
  await refreshPanel();
  return true;
}

async function chooseAgent(agent) {
  const own = bindingOf(TIERS[0]) ?? { channel: "web", peer: state.peer };
  showChat();
  if (!isWide()) {
    togglePanel(false);
  }
  if (await changeBindings("bindings.set", { ...withoutTier(own), agent })) {
    showNotice(`${agent} answers this chat now`);
  }
}

async function removeBinding(binding) {
  const fields = withoutTier(binding);
  if (await changeBindings("bindings.remove", fields)) {
    const undo = () => changeBindings("bindings.set", fields);
    showNotice("The binding is removed", "Undo", undo);
  }
}

onButton(byId("agents"), (button) => chooseAgent(button.dataset.key));
onButton(byId("sessions"), (button) => showSession(button.dataset.key));
onButton(byId("bindings"), (button) => {
  removeBinding(state.bindings[button.dataset.index]);
});

byId("unbind").addEventListener("click", () => {
  byId("agents").querySelector('[aria-pressed="true"]').focus(); // the button goes
  removeBinding(bindingOf(TIERS[0]));
});

const bindingEditor = byId("binding-editor");

bindingEditor.addEventListener("toggle", () => {
  if (bindingEditor.open) {
    bindingEditor.scrollIntoView({ block: "nearest" });
    byId("binding-form").elements.agent.focus({ preventScroll: true });
  }
});

byId("binding-form").addEventListener("submit", async (event) => {
  event.preventDefault();
  const form = event.target;
  const binding = Object.fromEntries(new FormData(form));
  binding.priority = Number(binding.priority);
  if (await changeBindings("bindings.set", binding)) {
    form.reset();
    bindingEditor.open = false;
    bindingEditor.querySelector("summary").focus();
    showNotice(`The binding to ${binding.agent} is set`);
  }
});

// --- another session, for reading only ---

async function showSession(key) {
  const own = state.reading ? state.ownSession : state.session;
  state.ownSession = own;
  state.reading = key === own ? "" : key;
  byId("back").textContent = "Back to my chat";
  if (!isWide()) {
    setPanel(false);
  }
  await loadHistory();
  showPanel();
  if (state.reading) {
    byId("back").focus();
  } else {
    focusText();
  }
}

export function showChat() {
  if (state.reading) {
    showSession(state.ownSession);
  }
}

byId("back").addEventListener("click", showChat);

// --- a column, or a drawer on a narrow screen ---

const wideScreen = matchMedia("(min-width: 900px)");

export function isWide() {
  return wideScreen.matches;
}

export function setPanel(isOpen) {
  const isDrawer = isOpen && !isWide();
  panel.hidden = !isOpen;
  byId("backdrop").hidden = !isDrawer;
  page.inert = isDrawer; // the keyboard stays in the drawer
  byId("panel-open").setAttribute("aria-expanded", String(isOpen));
}

export function togglePanel(isOpen) {
  setPanel(isOpen);
  if (isWide()) {
    localStorage.setItem("panel", isOpen ? "open" : "closed");
  }
  if (isOpen) {
    refreshPanel();
  }
  byId(isOpen ? "panel-close" : "panel-open").focus();
}

byId("panel-open").addEventListener("click", () => togglePanel(panel.hidden));
byId("panel-close").addEventListener("click", () => togglePanel(false));
byId("backdrop").addEventListener("click", () => togglePanel(false));
wideScreen.addEventListener("change", showPanelIfWide);

export function showPanelIfWide() {
  setPanel(isWide() && localStorage.getItem("panel") !== "closed");
}

setInterval(() => {
  if (!panel.hidden && !document.hidden) {
    refreshPanel();
  }
}, 1000 * PANEL_SECONDS);
