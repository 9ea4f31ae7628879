/** Log out: nothing of an answer is lost, and nothing is left for who comes next. */

import type { Asking } from "./asking";
import { confirmed } from "./confirm";
import type { Drafts } from "./drafts";
import type { Keeping } from "./keeping";
import { forgetKey, key } from "./key";
import { forgetPersonal } from "./preferences";

export async function logOut(asking: Asking, keeping: Keeping, drafts: Drafts): Promise<void> {
  await asking.stopAll();
  const num = await keeping.settle();
  if (num > 0) {
    const which = num === 1 ? "1 chat" : `${num} chats`;
    const question = `The server has not kept all of ${which}. Log out and lose what it has not?`;
    if (!(await confirmed(question, "Log out"))) return;
  }
  await keeping.forget();
  drafts.forget();
  forgetPersonal();
  forgetKey();
  startAnew();
}

/** Other tabs that went on with the same key show nothing of it any more, either. */
export function followLogOut(): void {
  const hadKey = () => key() !== "";
  let wasIn = hadKey();
  addEventListener("storage", () => {
    if (wasIn && !hadKey()) startAnew();
    wasIn = hadKey();
  });
}

function startAnew(): void {
  history.replaceState(null, "", "#/");
  location.reload();
}
