"""Runs train.py in children of a process that has imported everything already, so that a test can start it many times.

Reads one JSON object per line, {'args': [...], 'cwd': folder, 'log': file, 'setup': python code run first, 'envs':
variables of each child, a list}; answers with the children's pids, and, when all have ended, with their statuses.
"""
import json
import os
import sys
import traceback
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import sklearn.model_selection  # noqa: F401  for the digits, in this process and not in every child

import train


def run_child(job, env):
    log = os.open(job['log'], os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(log, 1)
    os.dup2(log, 2)
    os.chdir(job['cwd'])
    os.environ.update(env)
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
        pids = []
        for env in job.get('envs', [{}]):
            pids.append(os.fork())
            if pids[-1] == 0:
                code = run_child(job, env)
                sys.stdout.flush()
                sys.stderr.flush()
                os._exit(code)
        print(json.dumps(pids), flush=True)
        print(json.dumps([os.waitpid(pid, 0)[1] for pid in pids]), flush=True)


if __name__ == '__main__':
    main()
