// Talks to the server that this page came from. Keeps the key in memory, asks for it once; knows no view.

import { askKey } from "./dialog.js";
import { t } from "./words.js";

let key = null;
let asking = null;

/** What the server said when it refused, in its own words. */
export class Refusal extends Error {
  constructor(message, status, code = null) {
    super(message);
    this.status = status;
    this.code = code;
  }
}

/** A response that is fine, or a Refusal. `bearer` goes in the place of the key (the admin token). */
export async function call(path, { method = "GET", body, signal, bearer = null, ask = true } = {}) {
  for (;;) {
    const used = bearer ?? key;
    const response = await reach(path, { method, signal, body: body && JSON.stringify(body), headers: headers(used, body) });
    if (response.ok) return response;
    const refusal = await refused(response);
    if (response.status !== 401 || bearer !== null || !ask || !(await another(used, refusal.message))) throw refusal;
  }
}

/** Asks for the key because the user wants to give one. */
export const enterKey = () => another(key, t("key.refused"));

/** Asks for the key; whether there is one to try that is not the one that was refused. */
async function another(used, why) {
  if (key !== used) return true;  // another request has asked meanwhile
  asking ??= askKey(used === null ? null : why).finally(() => { asking = null; });
  key = await asking ?? key;
  return key !== used;
}

async function reach(path, options) {
  try {
    return await fetch(path, { cache: "no-store", credentials: "omit", referrerPolicy: "no-referrer", ...options });
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new Refusal(t("error.unreachable"), 0);
  }
}

function headers(bearer, body) {
  const made = {};
  if (body) made["Content-Type"] = "application/json";
  if (bearer) made.Authorization = `Bearer ${bearer}`;
  return made;
}

async function refused(response) {
  const text = await response.text().catch(() => "");
  let said = null;
  try { said = JSON.parse(text).error; } catch { /* not ours: a proxy's page, say */ }
  const message = said?.message ?? t("error.status", { status: String(response.status) });
  const after = response.headers.get("Retry-After");
  const wait = after && /^\d+$/.test(after) ? ` (${t("error.retry", { n: Number(after) })})` : "";
  return new Refusal(message + wait, response.status, said?.code ?? null);
}
