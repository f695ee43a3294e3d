"Drive headless Chromium over its DevTools protocol, without a network."
import base64, itertools, json, shutil, subprocess, time
from contextlib import contextmanager
from urllib.request import ProxyHandler, build_opener

from websocket import create_connection

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
FLAGS = ("--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking "
         "--disable-component-update --disable-sync --hide-scrollbars --remote-debugging-port=0 "
         "--remote-allow-origins=* --proxy-server=127.0.0.1:9 --proxy-bypass-list=<-loopback>").split()


class Tab:
    "One page: what it asked for, and what it complained about."
    def __init__(self, address):
        self.socket, self.numbers = create_connection(address, timeout=180), itertools.count(1)
        self.requests, self.complaints = [], []
        for domain in ("Page", "Network", "Runtime", "Log", "DOM"): self.send(f"{domain}.enable")

    def send(self, method, **params):
        "Call a method and return its result; events on the way are kept."
        number = next(self.numbers)
        self.socket.send(json.dumps(dict(id=number, method=method, params=params)))
        while (message := json.loads(self.socket.recv())).get("id") != number: self.keep(message)
        if "error" in message: raise RuntimeError(f"{method}: {message['error']['message']}")
        return message["result"]

    def keep(self, message):
        method, params = message.get("method"), message.get("params", {})
        if method == "Network.requestWillBeSent": self.requests.append(params["request"]["url"])
        entry, details = params.get("entry", {}), params.get("exceptionDetails", {})
        if method == "Network.loadingFailed": self.complaints.append(params["errorText"])
        if method == "Runtime.exceptionThrown": self.complaints.append(_thrown(details))
        if method == "Log.entryAdded" and entry["level"] == "error": self.complaints.append(entry["text"])
        if method == "Runtime.consoleAPICalled" and params["type"] == "error":
            self.complaints.append(str(params["args"]))

    def open(self, url, ready="true"):
        "Load a page and wait until an expression holds in it."
        self.send("Page.navigate", url="about:blank")
        self.requests, self.complaints = [], []
        self.send("Page.navigate", url=str(url))
        self.wait(f"document.readyState == 'complete' && location.href != 'about:blank' && ({ready})")

    def wait(self, expression, seconds=30):
        end = time.monotonic() + seconds
        while not self.evaluate(f"!!({expression})"):
            if time.monotonic() > end: raise TimeoutError(f"{expression} did not become true: {self.complaints}")
            time.sleep(.05)

    def evaluate(self, expression):
        "Return the JSON-able value of an expression, awaited."
        done = self.send("Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True)
        if "exceptionDetails" in done: raise RuntimeError(_thrown(done["exceptionDetails"]))
        return done["result"].get("value")

    def choose_file(self, selector, path):
        "Put a file into an input."
        root = self.send("DOM.getDocument")["root"]["nodeId"]
        node = self.send("DOM.querySelector", nodeId=root, selector=selector)["nodeId"]
        self.send("DOM.setFileInputFiles", nodeId=node, files=[str(path)])

    def resize(self, width, height, mobile=False, dark=False):
        self.send("Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=mobile)
        self.send("Emulation.setEmulatedMedia",
                  features=[dict(name="prefers-color-scheme", value="dark" if dark else "light")])

    def screenshot(self, path, whole=False):
        shot = self.send("Page.captureScreenshot", captureBeyondViewport=whole)
        path.write_bytes(base64.b64decode(shot["data"]))


def _thrown(details): return details.get("exception", {}).get("description", details["text"])


@contextmanager
def chromium(folder):
    "Start Chromium with an empty profile below a folder, and yield its tab."
    profile = folder/"profile"
    process = subprocess.Popen([CHROMIUM, *FLAGS, f"--user-data-dir={profile}", "about:blank"], text=True,
                               stderr=subprocess.PIPE, stdout=subprocess.DEVNULL)
    try:
        line = next(line for line in process.stderr if "DevTools listening on" in line)
        port = line.split("127.0.0.1:")[1].split("/")[0]
        tabs = json.load(build_opener(ProxyHandler({})).open(f"http://127.0.0.1:{port}/json"))
        tab = Tab(next(t["webSocketDebuggerUrl"] for t in tabs if t["type"] == "page"))
        yield tab
        tab.socket.close()
    finally:
        process.terminate()
        process.wait(20)
