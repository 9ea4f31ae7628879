import { expect, test, vi } from "vitest";
import { newConversation } from "../src/conversation";
import { SamplingPanel } from "../src/sampling-panel";

test("another chat brings its own settings, also where one is being written", () => {
  const changed = vi.fn();
  const panel = new SamplingPanel(changed, () => undefined);
  panel.element.hidden = false;
  document.body.append(panel.element);
  const area = panel.element.querySelector<HTMLTextAreaElement>("#system");
  if (!area) throw new Error("there is a system message");
  const one = newConversation(["a"], "of one");
  panel.show(one);
  area.focus();
  area.value = "of one, longer";
  panel.show(one);
  expect(area.value).toBe("of one, longer");
  panel.show(newConversation(["a"], "of two"));
  expect(area.value).toBe("of two");
});
