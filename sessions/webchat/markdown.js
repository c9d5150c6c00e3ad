// The text of an answer, as elements of the page. The only way for the text of a model
// or of another person to become HTML leads through renderMarkdown().

import { make } from "./page.js";

const { marked, DOMPurify } = window;

const ALLOWED_TAGS = (
  "a blockquote br code del em h4 h5 h6 hr li ol p pre strong" +
  " table tbody td th thead tr ul"
).split(" ");
const SANITIZE = {
  ALLOWED_TAGS,
  ALLOWED_ATTR: ["align", "class", "href", "start"],
  ALLOWED_URI_REGEXP: /^(?:https?|mailto):/i,
  ADD_URI_SAFE_ATTR: ["align", "start"],
  ALLOW_ARIA_ATTR: false,
  ALLOW_DATA_ATTR: false,
  RETURN_DOM_FRAGMENT: true,
};

const markdown = new marked.Marked({
  breaks: true,
  gfm: true,
  renderer: {
    // The page has headings of its own above those of an answer.
    heading({ tokens, depth }) {
      const level = Math.min(depth + 3, 6);
      return `<h${level}>${this.parser.parseInline(tokens)}</h${level}>`;
    },
    // HTML in an answer is shown as it is written, so that no text gets lost.
    html({ text, block }) {
      if (/^<br\s*\/?>$/i.test(text)) {
        return "<br>";
      }
      const shown = escapeHtml(text.trimEnd()).replaceAll("\n", "<br>");
      return block ? `<p>${shown}</p>` : shown;
    },
    // An image would be loaded from a foreign server, so it becomes a link.
    image({ href, text }) {
      return `<a href="${escapeHtml(href)}">Image: ${escapeHtml(text || href)}</a>`;
    },
    checkbox({ checked }) {
      return checked ? "☑ " : "☐ ";
    },
  },
});

function escapeHtml(text) {
  const entities = { "&": "&amp;", "<": "&lt;", ">": "&gt;", '"': "&quot;" };
  return text.replace(/[&<>"]/g, (character) => entities[character]);
}

// The only way for foreign text to become HTML. Returns a DocumentFragment.
export function renderMarkdown(text) {
  const fragment = DOMPurify.sanitize(markdown.parse(text), SANITIZE);
  for (const link of fragment.querySelectorAll("a[href]")) {
    link.target = "_blank";
    link.rel = "noopener noreferrer";
    link.title = link.getAttribute("href");
  }
  for (const block of fragment.querySelectorAll("pre")) {
    addCodeHead(block);
  }
  for (const table of fragment.querySelectorAll("table")) {
    const frame = make("div", "table-frame");
    frame.tabIndex = 0; // a wide table scrolls, also by keyboard
    table.replaceWith(frame);
    frame.append(table);
  }
  return fragment;
}

function addCodeHead(block) {
  const language = block.querySelector("code")?.className.replace("language-", "");
  const button = make("button", "copy-code text-button", "Copy");
  button.type = "button";
  button.setAttribute("aria-label", "Copy code");
  const head = make("div", "code-head", make("span", "", language || "text"), button);
  const frame = make("div", "code-frame", head);
  block.tabIndex = 0;
  block.replaceWith(frame);
  frame.append(block);
}

// Change only the nodes that differ: a selection and the place in a code block stay.
export function patchChildren(target, fresh) {
  const nodes = [...fresh.childNodes];
  nodes.forEach((node, index) => {
    const old = target.childNodes[index];
    if (!old) {
      target.append(node);
    } else if (!old.isEqualNode(node)) {
      patchNode(old, node);
    }
  });
  while (target.childNodes.length > nodes.length) {
    target.lastChild.remove();
  }
}

function patchNode(old, fresh) {
  const isText = old.nodeType === Node.TEXT_NODE && fresh.nodeType === Node.TEXT_NODE;
  if (isText) {
    old.data = fresh.data;
  } else if (old.cloneNode(false).isEqualNode(fresh.cloneNode(false))) {
    patchChildren(old, fresh);
  } else {
    old.replaceWith(fresh);
  }
}
