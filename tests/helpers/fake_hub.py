"""A Hub on this machine, for the official client: repositories that are made, written to and read from over HTTP."""

import base64
import hashlib
import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread
from urllib.parse import unquote, urlsplit

from huggingface_hub import ModelCard


COMMIT = "0123456789abcdef0123456789abcdef01234567"


@dataclass
class FakeHub:
    """Files of each repository, by their paths, and the metadata that the Hub would not have taken."""

    address: str = ""
    repositories: dict[str, dict[str, bytes]] = field(default_factory=dict)
    refused: list[str] = field(default_factory=list)

    def card(self, name: str) -> ModelCard:
        return ModelCard(self.repositories[name]["README.md"].decode())

    def info(self, name: str) -> dict:
        """What the Hub tells of a repository, most of it from its card."""
        files = self.repositories[name]
        data = self.card(name).data.to_dict() if "README.md" in files else {}
        tags = [*data.get("tags", []), *([f"license:{data['license']}"] if "license" in data else [])]
        siblings = [{"rfilename": path} for path in files]
        told = {"id": name, "modelId": name, "sha": COMMIT, "tags": tags, "siblings": siblings, "private": False}
        return told | {key: data[key] for key in ("pipeline_tag", "library_name") if key in data}

    def problems(self, content: str) -> list[str]:
        """What the Hub finds wrong with the metadata of a card."""
        data = ModelCard(content).data.to_dict()
        listed = {key: data.get(key) or [] for key in ("base_model", "datasets")}
        names = [name for value in listed.values() for name in ([value] if isinstance(value, str) else value)]
        found = [f"{name!r} is no name" for name in names if not re.fullmatch(r"[\w-][\w.-]*(/[\w-][\w.-]*)?", name)]
        for entry in data.get("model-index", []):
            for result in entry["results"]:
                found += [f"no {key}" for key in ("task", "dataset", "metrics") if not result.get(key)]
                found += [f"no {key} of the dataset" for key in ("type", "name") if not result["dataset"].get(key)]
        return found


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    hub: FakeHub

    def log_message(self, *args) -> None:
        pass

    def answer(self, content: object, status: int = 200, **headers: str) -> None:
        body = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(status)
        for name, value in {"Content-Length": str(len(body)), "X-Repo-Commit": COMMIT, **headers}.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def missing(self, what: str) -> None:
        self.answer({"error": "not found"}, 404, X_Error_Code=what)

    def do_POST(self) -> None:
        if self.headers.get("Transfer-Encoding") == "chunked":
            body = b""
            while size := int(self.rfile.readline(), 16):
                body += self.rfile.read(size)
                self.rfile.readline()
            self.rfile.readline()
        else:
            body = self.rfile.read(int(self.headers["Content-Length"]))
        path = unquote(urlsplit(self.path).path)
        if path == "/api/repos/create":
            given = json.loads(body)
            name = f"{given.get('organization') or 'somebody'}/{given['name']}"
            exists = name in self.hub.repositories
            self.hub.repositories.setdefault(name, {})
            self.answer({"url": f"{self.hub.address}/{name}"}, 409 if exists else 200)
        elif path == "/api/validate-yaml":
            problems = self.hub.problems(json.loads(body)["content"])
            self.hub.refused += problems
            errors = [{"message": problem} for problem in problems]
            self.answer({"errors": errors, "warnings": []}, 400 if errors else 200)
        elif "/preupload/" in path:
            files = [
                {"path": file["path"], "uploadMode": "regular", "shouldIgnore": False}
                for file in json.loads(body)["files"]
            ]
            self.answer({"files": files})
        elif match := re.fullmatch(r"/api/models/(.+)/commit/main", path):
            for line in map(json.loads, body.splitlines()):
                if line["key"] == "file":
                    content = base64.b64decode(line["value"]["content"])
                    self.hub.repositories[match[1]][line["value"]["path"]] = content
            url = f"{self.hub.address}/{match[1]}/commit/{COMMIT}"
            self.answer({"success": True, "commitOid": COMMIT, "commitUrl": url, "hookOutput": ""})
        else:
            self.missing("EntryNotFound")

    def do_GET(self) -> None:
        path = unquote(urlsplit(self.path).path)
        names = self.hub.repositories
        if path == "/api/whoami-v2":
            self.answer({"name": "somebody", "type": "user"})
        elif match := re.fullmatch(r"/api/models/([^/]+/[^/]+)(/revision/[^/]+)?", path):
            self.answer(self.hub.info(match[1])) if match[1] in names else self.missing("RepoNotFound")
        elif match := re.fullmatch(r"/([^/]+/[^/]+)/resolve/[^/]+/(.+)", path):
            if match[1] not in names:
                self.missing("RepoNotFound")
            elif match[2] not in names[match[1]]:
                self.missing("EntryNotFound")
            else:
                content = names[match[1]][match[2]]
                self.answer(content, ETag=f'"{hashlib.sha1(content).hexdigest()}"')
        else:
            self.missing("EntryNotFound")

    do_HEAD = do_GET


@contextmanager
def serving_hub() -> Iterator[FakeHub]:
    hub = FakeHub()
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), {"hub": hub}))
    hub.address = f"http://127.0.0.1:{server.server_port}"
    thread = Thread(target=server.serve_forever)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        thread.join()
        server.server_close()
