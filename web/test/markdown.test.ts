import { expect, test } from "vitest";
import { LiveMarkdown } from "../src/live-markdown";
import { lex, render } from "../src/markdown";

function html(text: string): string {
  const element = document.createElement("div");
  element.append(render(lex(text)));
  return element.innerHTML;
}

const HOSTILE = [
  "<script>alert(1)</script>",
  "<img src=x onerror=alert(1)>",
  "a <img src=x onerror=alert(1)> b",
  "![x](https://evil.example/a.png) ![y](javascript:alert(1)) ![z](data:image/svg+xml,<svg onload=alert(1)>)",
  '![x" onerror="alert(1)](https://evil.example/a.png)',
  "[a](javascript:alert(1)) [b](JaVaScRiPt:alert(1)) [c](data:text/html,x) [d](vbscript:x) [e](java&#10;script:alert(1))",
  '[a](https://a.example" onclick="alert(1))',
  '[a](https://a.example "x\\" onmouseover=alert(1)")',
  "<a href='https://a.example' onclick=alert(1) style='position:fixed'>x</a>",
  "<svg><style><img src=x onerror=alert(1)></style></svg><math><mtext><table><mglyph><style><img>",
  "<form action=https://evil.example><input name=nodes><button>x</button></form>",
  "<iframe srcdoc='<script>alert(1)</script>'></iframe><object data=x></object><embed src=x>",
  '```"><img src=x onerror=alert(1)>\ncode\n```',
  "~~~html onload=alert(1)\n<b>\n~~~",
  "<b onclick=alert(1)>x</b> <br onclick=alert(1)>",
  "| <img src=x onerror=alert(1)> |\n|---|\n| [a](javascript:x) |",
  "[r]\n\n[r]: javascript:alert(1)",
  "<javascript:alert(1)>",
  "<!--><img src=x onerror=alert(1)>-->",
  "<p id=app name=getElementById class=dialog>x</p>",
  `${">".repeat(4000)} <img src=x onerror=alert(1)>`,
];

test.each(HOSTILE)("%s does nothing", (text) => {
  const element = document.createElement("div");
  new LiveMarkdown(element).finish(text);
  const all = [...element.querySelectorAll("*")];
  const tags = new Set(all.map((each) => each.tagName.toLowerCase()));
  for (const tag of [
    "script",
    "img",
    "iframe",
    "object",
    "embed",
    "form",
    "input",
    "style",
    "math",
  ]) {
    expect(tags).not.toContain(tag);
  }
  for (const each of all) {
    for (const { name, value } of each.attributes) {
      expect(name).not.toMatch(/^on|^style$|^src|^id$|^name$/);
      if (name === "href") expect(value).toMatch(/^(https?|mailto):/);
    }
  }
});

test("HTML of the model's own is shown as text", () => {
  expect(html("use <div> here")).toBe('<p dir="auto">use &lt;div&gt; here</p>\n');
  expect(html("H<sub>2</sub>O<br>x")).toBe('<p dir="auto">H<sub>2</sub>O<br>x</p>\n');
});

test("a link says where it leads", () => {
  const element = document.createElement("div");
  element.innerHTML = html(
    "[https://good.example](https://evil.example/x) <https://a.example/b> [u](https://good.example@evil.example)",
  );
  const [lying, honest, disguised] = [...element.querySelectorAll("a")];
  expect(lying?.textContent).toBe("https://good.example (evil.example)");
  expect(lying?.rel).toBe("noopener noreferrer nofollow");
  expect(lying?.target).toBe("_blank");
  expect(honest?.textContent).toBe("https://a.example/b");
  expect(disguised?.textContent).toBe("u (evil.example)");
});

test("an image is a link to it", () => {
  const element = document.createElement("div");
  element.innerHTML = html("![a cat](https://a.example/cat.png)");
  expect(element.querySelector("img")).toBeNull();
  expect(element.querySelector("a")?.textContent).toBe("[image: a cat] (a.example)");
});

const DOCUMENT = `# Title

Some *text* over
two lines with \`code\` and https://a.example.

- one
- two
  - nested

      indented

- three

1. first

   \`\`\`py
   def f(): pass
   \`\`\`
2. second

\`\`\`js
const a = 1;

const b = "\`\`\`";
\`\`\`\`
~~~
plain

~~~
| a | b |
|---|--:|
| 1 | 2 |

> quote
> more

Setext
======

[link][ref] and <b>bold</b>

[ref]: https://ref.example

${Array.from({ length: 30 }, (_, i) => `${i + 1}. item ${i + 1}\n`).join("")}
***
\ttabbed code

\`\`\`
never closed`;

test.each([1, 3, 7, 40])("in pieces of %i it comes to the same as at once", (size) => {
  const whole = document.createElement("div");
  new LiveMarkdown(whole).finish(DOCUMENT);
  const element = document.createElement("div");
  const live = new LiveMarkdown(element);
  for (let end = size; end < DOCUMENT.length; end += size) live.update(DOCUMENT.slice(0, end));
  live.finish(DOCUMENT);
  expect(element.textContent).toBe(whole.textContent);
  const expected = document.createElement("div");
  expected.append(render(lex(DOCUMENT)));
  expect(element.innerHTML.replace(/\s+/g, " ")).toBe(expected.innerHTML.replace(/\s+/g, " "));
});

test("what is settled is never made anew", () => {
  const element = document.createElement("div");
  const live = new LiveMarkdown(element);
  live.update("first\n\nsecond\n\nthi");
  const [first, second] = element.querySelectorAll("p");
  live.update("first\n\nsecond\n\nthird\n\nfourth");
  expect([...element.querySelectorAll("p")].slice(0, 2)).toEqual([first, second]);
  expect(live.takeNews()).toBe("first\nsecond");
  expect(live.takeNews()).toBe("");
  live.finish("first\n\nsecond\n\nthird\n\nfourth");
  expect(live.takeNews()).toBe("third\nfourth");
});

test("an answer that was whole and goes on is one text", () => {
  const element = document.createElement("div");
  const live = new LiveMarkdown(element);
  live.finish("One, tw");
  live.update("One, two, *thr");
  live.finish("One, two, *three*");
  expect(element.innerHTML.trim()).toBe('<p dir="auto">One, two, <em>three</em></p>');
});

test("code that is not closed grows by its new text", () => {
  const element = document.createElement("div");
  const live = new LiveMarkdown(element);
  live.update("```py\nx = 1\ny");
  const code = element.querySelector("code");
  expect(code?.textContent).toBe("x = 1\ny");
  live.update("```py\nx = 1\ny = 2\n``");
  expect(element.querySelector("code")).toBe(code);
  expect(code?.textContent).toBe("x = 1\ny = 2\n");
  live.update("```py\nx = 1\ny = 2\n```\nAfter");
  expect(element.querySelector("code")).toBe(code);
  expect(code?.textContent).toBe("x = 1\ny = 2");
  expect(element.querySelector("p")?.textContent).toBe("After");
});

test("a long answer makes its last block anew, not all that is there", () => {
  const paragraph = `${"word ".repeat(60)}\n\n`;
  const text = paragraph.repeat(50);
  const element = document.createElement("div");
  const live = new LiveMarkdown(element);
  let made = 0;
  const observer = new MutationObserver(() => {});
  observer.observe(element, { childList: true });
  for (let end = 20; end < text.length; end += 20) live.update(text.slice(0, end));
  for (const record of observer.takeRecords()) made += record.addedNodes.length;
  // 750 updates; all paragraphs each time would be 19,000
  expect(made).toBeLessThan(10 * 750);
  expect(element.querySelectorAll("p")).toHaveLength(50);
});

test("what is too deep for Markdown is plain text, also while it grows", () => {
  const element = document.createElement("div");
  const live = new LiveMarkdown(element);
  const deep = `Before.\n\n${">".repeat(4000)} deep`;
  live.update("Before.\n\n> a");
  live.update(deep);
  live.update(`${deep}er`);
  expect(element.textContent).toBe(`${deep}er`);
  live.finish(`${deep}er than that`);
  expect(element.textContent).toBe(`${deep}er than that`);
  expect(live.takeNews()).toContain("deeper than that");
  live.finish("> another");
  expect(element.querySelector("blockquote")?.textContent).toContain("another");
});

test("a block of code is named and coloured by its language", () => {
  expect(html("```python\npass\n```")).toContain("python");
});

test("a list begins with its number", () => {
  expect(html("3. three\n4. four")).toContain('<ol start="3"');
});

test("columns keep their alignment", () => {
  expect(html("| a |\n|--:|\n| 1 |")).toContain('align="right"');
});
