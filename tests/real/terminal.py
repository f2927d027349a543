# Runs a command on a pseudo-terminal of its own: types what is appended to the file `keys`, and appends what the command
# shows to the file `screen`. Ends with the command. SHELL decides whether `script` runs it by a shell that drops PS1.
import os, pty, select, sys

directory = sys.argv[1]
pid, master = pty.fork()
if pid == 0:
    os.chdir(directory)
    os.environ.update(TERM="vt100", HOME=directory, PS1="prompt> ", SHELL="/bin/sh", HISTFILE="")
    os.execv(sys.argv[2], sys.argv[2:])
keys = os.open(os.path.join(directory, "keys"), os.O_RDONLY)
screen = os.open(os.path.join(directory, "screen"), os.O_WRONLY | os.O_CREAT | os.O_APPEND)
while True:
    readable, _, _ = select.select([master], [], [], 0.005)
    if readable:
        try:
            shown = os.read(master, 65536)
        except OSError:
            break
        if not shown:
            break
        os.write(screen, shown)
    typed = os.read(keys, 65536)
    if typed:
        os.write(master, typed)
_, status = os.waitpid(pid, 0)
sys.exit(os.waitstatus_to_exitcode(status))
