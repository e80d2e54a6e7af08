"""What tests do with a browser."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from selenium.webdriver.common.action_chains import ActionChains
from selenium.webdriver.common.by import By

_AXE = """
const [source, done] = arguments;
if (!window.axe) (0, eval)(source);
axe.run(document, {resultTypes: ["violations"]}).then(done);
"""
#: A page is wider than its window where an element reaches beyond it that no ancestor cuts off.
_WIDE = """
const room = document.documentElement.clientWidth;
const wide = [];
for (const each of document.querySelectorAll("body *")) {
  if (each.getBoundingClientRect().right <= room + 1 || !each.checkVisibility()) continue;
  if (each.closest(".skip, svg *")) continue;
  let box = each.parentElement;
  while (box && getComputedStyle(box).overflowX === "visible") box = box.parentElement;
  if (!box || box === document.documentElement) wide.push(each.outerHTML.slice(0, 80));
}
return [room, document.documentElement.scrollWidth, wide];
"""


@dataclass(frozen=True, eq=False)
class View:
    """A browser and what axe-core is."""

    driver: Any
    axe: str

    def open(self, path: Path, width: int = 1280, scheme: str = "light", media: str = "") -> None:
        """Show a page in a window of some width, light or dark, on a screen or on paper."""
        self.scripts(True)
        self.protocol(
            "Emulation.setDeviceMetricsOverride",
            width=width, height=900, deviceScaleFactor=1, mobile=width < 500,
        )  # fmt: skip
        features = [{"name": "prefers-color-scheme", "value": scheme}]
        self.protocol("Emulation.setEmulatedMedia", media=media, features=features)
        self.logs("browser")
        self.logs("performance")
        self.driver.get(path.as_uri())

    def protocol(self, name: str, **values: Any) -> Any:
        """A command of the DevTools protocol."""
        return self.driver.execute_cdp_cmd(name, values)

    def scripts(self, run: bool) -> None:
        """Whether pages may run scripts."""
        self.protocol("Emulation.setScriptExecutionDisabled", value=not run)

    def logs(self, kind: str) -> list[Any]:
        """What was logged since this was last asked for."""
        return list(self.driver.get_log(kind))

    def requests(self) -> list[str]:
        """Every address that was asked for since the page was opened."""
        messages = [json.loads(each["message"])["message"] for each in self.logs("performance")]
        return [
            each["params"]["request"]["url"]
            for each in messages
            if each["method"] == "Network.requestWillBeSent"
        ]

    def run(self, script: str, *values: Any) -> Any:
        """The value of a script."""
        return self.driver.execute_script(script, *values)

    def find(self, selector: str) -> Any:
        """The first element."""
        return self.driver.find_element(By.CSS_SELECTOR, selector)

    def all(self, selector: str) -> list[Any]:
        """All elements."""
        return list(self.driver.find_elements(By.CSS_SELECTOR, selector))

    def texts(self, selector: str) -> list[str]:
        """The text of all elements, also of those that are not shown."""
        script = "return [...document.querySelectorAll(arguments[0])].map(e => e.textContent)"
        return list(self.run(script, selector))

    def press(self, *keys: str) -> None:
        """Press keys, wherever the focus is."""
        for key in keys:
            ActionChains(self.driver, duration=0).send_keys(key).perform()

    def unfold(self) -> None:
        """Open everything that can be opened."""
        self.run("for (const each of document.querySelectorAll('details')) each.open = true")

    def assert_quiet(self) -> None:
        """Nothing was logged, and nothing was asked for but the page."""
        logged = self.logs("browser")
        assert logged == [], logged
        asked = {each for each in self.requests() if not each.startswith("data:")}
        assert asked == {self.driver.current_url}, asked

    def assert_fits(self) -> None:
        """The page is no wider than its window."""
        room, width, wide = self.run(_WIDE)
        assert (width <= room, wide) == (True, []), wide

    def assert_accessible(self) -> None:
        """axe-core finds nothing serious."""
        self.driver.set_script_timeout(60)
        found = self.driver.execute_async_script(_AXE, self.axe)
        assert found["testEngine"]["name"] == "axe-core"
        grave = [each for each in found["violations"] if each["impact"] in ("serious", "critical")]
        said = [(each["id"], each["nodes"][0]["html"]) for each in grave]
        assert said == [], said
