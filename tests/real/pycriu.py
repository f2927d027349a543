"""A client by Debian's pycriu: ACTION PROGRAM-OR-SOCKET [DIR [PID]]."""

import os
import sys

sys.path.insert(0, "/usr/lib/python3/dist-packages")
import pycriu

action, server = sys.argv[1:3]
criu = pycriu.criu()
if server.endswith("socket"):
    criu.use_sk(server)
else:
    criu.use_binary(server)
criu.opts.images_dir_fd = os.open(sys.argv[3] if sys.argv[3:] else "/", os.O_DIRECTORY)
criu.opts.log_level = 4
criu.opts.log_file = "pycriu.log"
if action == "check":
    criu.check()
elif action == "dump":
    criu.opts.pid = int(sys.argv[4])
    criu.dump()
else:
    print("pid", criu.restore().pid)
