"""Runs train.py in children of a process that has imported everything already, so that a test can start it many times.

Reads one JSON object per line, {'args': [...], 'cwd': folder, 'log': file, 'setup': python code run first}; answers
with the child's pid, and, when it has ended, with its status.
"""
import json
import os
import sys
import traceback
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import train


def run_child(job):
    log = os.open(job['log'], os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(log, 1)
    os.dup2(log, 2)
    os.chdir(job['cwd'])
    os.environ.update(job.get('env', {}))
    try:
        exec(job.get('setup', ''), {'train': train})
        train.main(job['args'])
    except SystemExit as exit_:
        return exit_.code or 0
    except BaseException:
        traceback.print_exc()
        return 1
    return 0


def main():
    for line in sys.stdin:
        job = json.loads(line)
        pid = os.fork()
        if pid == 0:
            code = run_child(job)
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code)
        print(pid, flush=True)
        print(os.waitpid(pid, 0)[1], flush=True)


if __name__ == '__main__':
    main()
