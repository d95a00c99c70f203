// The chat: a conversation through /v1/chat/completions, streamed.

import { ask, events } from "./server.js";

const $ = (id) => document.getElementById(id);

export class Chat {
  constructor() {
    this.turns = [];
    this.stops = null; // an AbortController while an answer comes
    $("ask").addEventListener("submit", (event) => {
      event.preventDefault();
      this.stops ? this.stops.abort() : this.send();
    });
    $("question").addEventListener("keydown", (event) => {
      if (event.key !== "Enter" || event.shiftKey || event.isComposing) return;
      event.preventDefault();
      if (!this.stops) this.send();
    });
    $("anew").addEventListener("click", () => this.forget());
    this.empty = $("messages").firstElementChild;
  }

  forget() {
    this.stops?.abort();
    this.turns = [];
    $("messages").replaceChildren(this.empty);
    $("question").focus();
  }

  async send() {
    const text = $("question").value;
    if (!text.trim()) return;
    $("question").value = "";
    this.empty.remove();
    const turns = this.turns;
    turns.push({ role: "user", content: text });
    addMessage("user").text.textContent = text;
    const shown = addMessage("assistant");
    shown.box.classList.add("busy");
    this.#busy(new AbortController());
    const answer = { role: "assistant", content: "", reasoning_content: "" };
    try {
      await this.#receive(turns, answer, shown);
    } catch (error) {
      if (error.name === "AbortError") shown.about.textContent = "Stopped.";
      else showError(shown, error.message);
    } finally {
      shown.box.classList.remove("busy");
      this.#busy(null);
    }
    if (!shown.text.textContent && !shown.details.isConnected) shown.text.remove();
    if (answer.content || answer.reasoning_content) {
      if (!answer.reasoning_content) delete answer.reasoning_content;
      turns.push(answer);
      $("chat-said").textContent = `The answer: ${answer.content}`;
    } else {
      turns.pop(); // a question without an answer is not asked again with the next one
    }
  }

  async #receive(turns, answer, shown) {
    const body = { model: "page", messages: turns, stream: true, stream_options: { include_usage: true } };
    const begun = performance.now();
    let first = 0, reason = null, usage = null;
    const response = await ask("/v1/chat/completions", { body, signal: this.stops.signal });
    for await (const { data } of events(response)) {
      if (data === "[DONE]") break;
      const value = JSON.parse(data);
      if (value.error) throw new Error(value.error.message);
      usage = value.usage ?? usage;
      const choice = value.choices[0];
      if (!choice) continue;
      reason = choice.finish_reason ?? reason;
      const { content, reasoning_content: thought } = choice.delta;
      if ((content || thought) && !first) first = performance.now();
      keepAtEnd(() => {
        if (thought) addThought(shown, (answer.reasoning_content += thought));
        if (content) shown.text.textContent = (answer.content += content).trimStart();
      });
    }
    keepAtEnd(() => (shown.about.textContent = about(usage, reason, first - begun, performance.now() - first)));
  }

  #busy(stops) {
    this.stops = stops;
    $("send").textContent = stops ? "Stop" : "Send";
    $("messages").setAttribute("aria-busy", String(stops !== null));
    if (stops) $("chat-said").textContent = "The answer comes.";
  }
}

function about(usage, reason, firstMs, restMs) {
  if (!usage) return "";
  const said = [`${usage.completion_tokens} tokens`];
  if (usage.completion_tokens > 1 && restMs > 0) {
    said.push(`${(((usage.completion_tokens - 1) / restMs) * 1000).toFixed(1)} tok/s`);
  }
  said.push(`began after ${(firstMs / 1000).toFixed(2)} s`);
  const cached = usage.prompt_tokens_details?.cached_tokens;
  said.push(`${usage.prompt_tokens} of prompt${cached ? `, ${cached} of them kept from before` : ""}`);
  if (reason === "length") said.push("ended at the limit of tokens");
  return said.join(" · ");
}

function make(tag, className, parent) {
  const made = document.createElement(tag);
  made.className = className;
  parent?.append(made);
  return made;
}

function addMessage(role) {
  const box = make("div", `message ${role}`, $("messages"));
  const details = make("details", ""), thought = document.createElement("p");
  make("summary", "", details).textContent = "Reasoning";
  thought.className = "text";
  details.append(thought);
  const text = make("p", "text", box), said = make("p", "about", box);
  box.prepend(Object.assign(make("span", "hidden"), { textContent: role === "user" ? "You:" : "Model:" }));
  box.scrollIntoView({ block: "nearest" });
  $("messages").scrollTop = $("messages").scrollHeight;
  return { box, details, thought, text, about: said };
}

function addThought(shown, text) {
  if (!shown.details.isConnected) shown.text.before(shown.details);
  shown.thought.textContent = text;
}

function showError(shown, message) {
  const line = make("p", "error", shown.box);
  line.setAttribute("role", "alert");
  line.textContent = message;
  $("messages").scrollTop = $("messages").scrollHeight;
}

// Change the messages; where the end was in sight, it stays so.
function keepAtEnd(change) {
  const messages = $("messages");
  const isAtEnd = messages.scrollHeight - messages.scrollTop - messages.clientHeight < 40;
  change();
  if (isAtEnd) messages.scrollTop = messages.scrollHeight;
}
