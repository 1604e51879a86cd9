// The server's API as the page uses it. The key stays in this tab's session storage and goes nowhere but to this server.

const KEY = "aurora-key";

/** Somebody has to give a key, or another one. */
export class KeyWanted extends Error {}

/** @param {string} key */
export function useKey(key) {
  sessionStorage.setItem(KEY, key);
}

/**
 * @param {string} path relative to the page, so that a proxy's prefix stays
 * @param {RequestInit} [options]
 * @returns {Promise<Response>} an answer without an error
 */
export async function ask(path, options = {}) {
  const key = sessionStorage.getItem(KEY);
  const headers = { ...options.headers, ...(key ? { authorization: `Bearer ${key}` } : {}) };
  const answer = await fetch(path, { ...options, headers, cache: "no-store", credentials: "omit" });
  if (answer.status === 401) throw new KeyWanted("the server asks for a key");
  if (!answer.ok) throw new Error(await reason(answer));
  return answer;
}

/** @param {Response} answer @returns {Promise<string>} */
async function reason(answer) {
  const text = await answer.text();
  try {
    return JSON.parse(text).error.message;
  } catch {
    return `status ${answer.status}`;
  }
}

/**
 * The events of a stream until it says that it is done.
 * @param {Response} answer
 * @returns {AsyncGenerator<any>}
 */
export async function* events(answer) {
  if (!answer.body) return;
  const reader = answer.body.pipeThrough(new TextDecoderStream()).getReader();
  let waiting = "";
  for (let read = await reader.read(); !read.done; read = await reader.read()) {
    const parts = (waiting + read.value).split("\n\n");
    waiting = parts.pop() ?? "";
    for (const part of parts) {
      const data = part.replace(/^data: /, "");
      if (data === "[DONE]") return;
      yield JSON.parse(data);
    }
  }
}
