//! Real programs of real images.

use crate::{
    case::{Case, row},
    container::{NGINX, PYTHON, ctr},
};

pub(super) fn cases() -> Vec<Case> {
    vec![
        row(
            "image/python-version",
            ctr(PYTHON)
                .command(["python3", "--version"])
                .stdout_has(["Python 3."]),
        ),
        row(
            "image/python-script",
            ctr(PYTHON).python(SCRIPT).stdout("ok\n"),
        ),
        row(
            "image/debian-tools",
            ctr(PYTHON)
                .sh(
                    ". /etc/os-release && echo $ID && dpkg --version | head -n 1 && \
                     find /usr -xdev -type f | wc -l | grep -E '^[0-9]{3,}$' >/dev/null && \
                     tar -C / -cf - etc | tar -tf - | grep -c '^etc/passwd$'",
                )
                .stdout_has(["debian\n", "dpkg", "\n1\n"]),
        ),
        row(
            "image/nginx-serves-a-page",
            // As a daemon it returns when it listens.
            ctr(NGINX)
                .command([
                    "bash",
                    "-c",
                    "sed 's/daemon off/daemon on/' /etc/nginx/nginx.conf >/etc/nginx/on.conf && \
                     nginx -c /etc/nginx/on.conf && exec 3<>/dev/tcp/127.0.0.1/80 && \
                     printf 'GET / HTTP/1.0\\r\\n\\r\\n' >&3 && cat <&3",
                ])
                .stdout_has(["HTTP/1.1 200 OK", "<title>"]),
        ),
    ]
}

/// What ordinary programs use: modules from many files, TLS, threads, processes, sockets, a
/// database on the root.
const SCRIPT: &str = r#"
import concurrent.futures, hashlib, json, multiprocessing, os, socket, sqlite3, ssl, subprocess, tempfile, threading
assert json.loads(json.dumps({"a": [1, 2.5, None, "x"]})) == {"a": [1, 2.5, None, "x"]}
assert ssl.create_default_context().verify_mode == ssl.CERT_REQUIRED
assert hashlib.sha256(b"").hexdigest().startswith("e3b0c442")
with concurrent.futures.ThreadPoolExecutor(4) as pool:
    assert sum(pool.map(lambda n: n * n, range(100))) == 328350
with multiprocessing.Pool(2) as pool: assert pool.map(abs, [-1, -2, -3]) == [1, 2, 3]
assert subprocess.run(["sh", "-c", "cat; exit 3"], input=b"x", capture_output=True).stdout == b"x"
left, right = socket.socketpair(); left.sendall(b"ping"); assert right.recv(4) == b"ping"
server = socket.create_server(("127.0.0.1", 0))
threading.Thread(target=lambda: server.accept()[0].sendall(b"hello")).start()
assert socket.create_connection(server.getsockname()).recv(5) == b"hello"
with tempfile.TemporaryDirectory() as folder:
    base = sqlite3.connect(os.path.join(folder, "base"))
    base.execute("create table t (n)"); base.executemany("insert into t values (?)", [(n,) for n in range(100)])
    base.commit(); assert base.execute("select sum(n) from t").fetchone() == (4950,)
print("ok")
"#;
