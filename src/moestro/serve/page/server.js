// Requests to this server, with the key where it wants one, and its streams of events.

const KEPT = "moestro-key";
let asking = null; // a promise of a key, while the page asks for it

export class Unreachable extends Error {}

// Ask the server; a 401 asks for the key, and then once more.
export async function ask(path, { body, signal } = {}) {
  for (;;) {
    const key = sessionStorage.getItem(KEPT);
    const headers = key === null ? {} : { Authorization: `Bearer ${key}` };
    if (body) headers["Content-Type"] = "application/json";
    let response;
    try {
      response = await fetch(path, {
        method: body ? "POST" : "GET", headers, signal, body: body && JSON.stringify(body), cache: "no-store",
      });
    } catch (error) {
      if (error.name === "AbortError") throw error;
      throw new Unreachable("The server cannot be reached.");
    }
    if (response.ok) return response;
    if (response.status === 401) {
      await (asking ??= askForKey(key !== null).finally(() => (asking = null)));
      continue;
    }
    throw new Error(await messageOf(response));
  }
}

async function messageOf(response) {
  try {
    return (await response.json()).error.message;
  } catch {
    return `The server answered with status ${response.status}.`;
  }
}

// The events of a stream: {name, data}.
export async function* events(response) {
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let text = "";
  try {
    for (;;) {
      const { done, value } = await reader.read();
      if (done) return;
      text += value;
      for (let end; (end = text.indexOf("\n\n")) >= 0; text = text.slice(end + 2)) {
        const found = { name: "message", data: "" };
        for (const line of text.slice(0, end).split("\n")) {
          if (line.startsWith("event: ")) found.name = line.slice(7);
          else if (line.startsWith("data: ")) found.data += line.slice(6);
        }
        if (found.data) yield found;
      }
    }
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new Unreachable("The connection to the server was cut.");
  } finally {
    reader.cancel().catch(() => {});
  }
}

function askForKey(wasWrong) {
  const dialog = document.getElementById("key"), input = document.getElementById("key-value");
  sessionStorage.removeItem(KEPT);
  document.getElementById("key-wrong").hidden = !wasWrong;
  input.value = "";
  dialog.showModal();
  input.focus();
  return new Promise((resolve) => {
    dialog.addEventListener("cancel", (event) => event.preventDefault());
    document.getElementById("key-form").onsubmit = (event) => {
      event.preventDefault();
      sessionStorage.setItem(KEPT, input.value);
      dialog.close();
      resolve();
    };
  });
}
