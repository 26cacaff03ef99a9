"""The system calls that a program in the sandbox may make, as a seccomp filter for the Linux kernel.

A list of what is allowed; all else fails with ``EPERM``. So a program reads and writes files (which ones is Landlock's
or the mount namespace's part), computes, sleeps and starts threads, and does nothing to anybody else: no process, no
program to execute, no socket but a pair of its own, no signal, no mode or owner of a file, no tracing.

Source: Linux, ``Documentation/userspace-api/seccomp_filter.rst`` and ``include/uapi/linux/bpf_common.h``.
"""

from __future__ import annotations

import errno
import platform
import struct
import sys
from dataclasses import dataclass

# name:number on x86_64:number on aarch64, "-" where the machine has no such call
_CALLS = """
read:0:63 write:1:64 close:3:57 fstat:5:80 lstat:6:- stat:4:- newfstatat:262:79 statx:332:291 lseek:8:62 mmap:9:222
mprotect:10:226 munmap:11:215 brk:12:214 mremap:25:216 madvise:28:233 msync:26:227 mincore:27:232
rt_sigaction:13:134 rt_sigprocmask:14:135 rt_sigreturn:15:139 rt_sigpending:127:136 rt_sigtimedwait:128:137
rt_sigsuspend:130:133 sigaltstack:131:132 pause:34:- alarm:37:- getitimer:36:102 setitimer:38:103
restart_syscall:219:128 pread64:17:67 pwrite64:18:68 readv:19:65 writev:20:66 preadv:295:69 pwritev:296:70
access:21:- faccessat:269:48 faccessat2:439:439 creat:85:- pipe:22:- pipe2:293:59 select:23:- pselect6:270:72
poll:7:- ppoll:271:73 epoll_create:213:- epoll_create1:291:20 epoll_ctl:233:21 epoll_wait:232:- epoll_pwait:281:22
eventfd:284:- eventfd2:290:19 sched_yield:24:124 sched_getaffinity:204:123 dup:32:23 dup2:33:- dup3:292:24
nanosleep:35:101 clock_nanosleep:230:115 clock_gettime:228:113 clock_getres:229:114 gettimeofday:96:169 time:201:-
times:100:153 getpid:39:172 gettid:186:178 getppid:110:173 getuid:102:174 geteuid:107:175 getgid:104:176
getegid:108:177 getresuid:118:148 getresgid:120:150 getgroups:115:158 getpgrp:111:- getpgid:121:155 getsid:124:156
exit:60:93 exit_group:231:94 wait4:61:260 waitid:247:95 uname:63:160 fsync:74:82 fdatasync:75:83
ftruncate:77:46 getdents:78:- getdents64:217:61 getcwd:79:17 chdir:80:49 fchdir:81:50 rename:82:- renameat:264:38
renameat2:316:276 unlink:87:- unlinkat:263:35 rmdir:84:- readlink:89:- readlinkat:267:78 umask:95:166 statfs:137:43
fstatfs:138:44 fadvise64:221:223 sendfile:40:71 copy_file_range:326:285 close_range:436:436 getrlimit:97:163
setrlimit:160:164 getrusage:98:165 sysinfo:99:179 arch_prctl:158:- futex:202:98 set_tid_address:218:96
set_robust_list:273:99 get_robust_list:274:100 rseq:334:293 membarrier:324:283 getcpu:309:168 getrandom:318:278
recvfrom:45:207 shutdown:48:210 getsockopt:55:209 setsockopt:54:208 getsockname:51:204 getpeername:52:205
"""
# allowed with certain arguments (_RULES)
_ARGUED = """
open:2:- openat:257:56 ioctl:16:29 fcntl:72:25 clone:56:220 prctl:157:167 prlimit64:302:261 sendto:44:206
socketpair:53:199
"""
# refused as if the kernel did not know them: the C library then makes the older call, whose arguments can be seen
_UNKNOWN = "clone3:435:435 openat2:437:437"

_MACHINES = {"x86_64": (1, 0xC000003E), "aarch64": (2, 0xC00000B7)}
"""Column of the tables, and ``AUDIT_ARCH`` of the machine."""
_LOAD, _AND, _EQUAL, _RETURN = 0x20, 0x54, 0x15, 0x06
_ALLOW, _REFUSE, _KILL_PROCESS = 0x7FFF0000, 0x00050000, 0x80000000

Instruction = tuple[int, int, int, int]


@dataclass(slots=True, frozen=True)
class Rule:
    """The low or high half of one argument, masked, is one of ``values`` — or none of them."""

    argument: int
    values: tuple[int, ...]
    mask: int = 0xFFFFFFFF
    high: bool = False
    none_of: bool = False


_O_ACCMODE_TRUNC, _O_TRUNC = 0o1003, 0o1000
_CLONE_THREAD, _CLONE_NAMESPACES = 0x10000, 0x7E020080
_RULES: dict[str, tuple[Rule, ...]] = {
    # emptying a file through a descriptor for reading: the first versions of Landlock take no notice
    "open": (Rule(1, (_O_TRUNC,), _O_ACCMODE_TRUNC, none_of=True),),
    "openat": (Rule(2, (_O_TRUNC,), _O_ACCMODE_TRUNC, none_of=True),),
    # TCGETS, TIOCGWINSZ, FIONREAD, FIONBIO, FIOCLEX, FIONCLEX; not FIOSETOWN, which makes the kernel send signals
    "ioctl": (Rule(1, (0x5401, 0x5413, 0x541B, 0x5421, 0x5451, 0x5450)),),
    # F_DUPFD, F_GETFD, F_SETFD, F_GETFL, F_SETFL, locks, F_DUPFD_CLOEXEC; not F_SETOWN and F_SETSIG
    "fcntl": (Rule(1, (0, 1, 2, 3, 4, 5, 6, 7, 1030)),),
    "clone": (Rule(0, (_CLONE_THREAD,), _CLONE_THREAD | _CLONE_NAMESPACES),),
    "prctl": (Rule(0, (15, 16)),),  # PR_SET_NAME, PR_GET_NAME
    "prlimit64": (Rule(0, (0,)),),  # its own
    "sendto": (Rule(4, (0,)), Rule(4, (0,), high=True)),  # to the other end alone
    "socketpair": (Rule(0, (1,)),),  # AF_UNIX, which asyncio's loop wakes itself with
}


def numbers(machine: str) -> dict[str, int]:
    """Every call of the tables that ``machine`` has."""
    column, _ = _MACHINES[machine]
    rows = [row.split(":") for row in f"{_CALLS} {_ARGUED} {_UNKNOWN}".split()]
    return {row[0]: int(row[column]) for row in rows if row[column] != "-"}


def supported() -> bool:
    """Whether the tables know this machine."""
    return sys.platform == "linux" and platform.machine() in _MACHINES and struct.calcsize("P") == 8


def program(machine: str) -> list[Instruction]:
    """The filter as BPF instructions (code, jump if true, jump if false, value)."""
    _, architecture = _MACHINES[machine]
    found: list[Instruction] = [
        (_LOAD, 0, 0, 4),
        (_EQUAL, 1, 0, architecture),
        (_RETURN, 0, 0, _KILL_PROCESS),
        (_LOAD, 0, 0, 0),
    ]
    unknown = {row.split(":")[0] for row in _UNKNOWN.split()}
    for name, number in numbers(machine).items():
        body = [(_RETURN, 0, 0, _REFUSE | errno.ENOSYS)] if name in unknown else _body(_RULES.get(name, ()))
        found += [(_EQUAL, 0, len(body), number), *body]
    return [*found, (_RETURN, 0, 0, _REFUSE | errno.EPERM)]


def compiled(machine: str) -> bytes:
    """The filter as an array of ``struct sock_filter``."""
    return b"".join(struct.pack("=HBBI", *instruction) for instruction in program(machine))


def _body(rules: tuple[Rule, ...]) -> list[Instruction]:
    """What is decided once the call is known: every rule holds, or ``EPERM``."""
    found: list[Instruction] = []
    for rule in rules:
        count = len(rule.values)
        found += [(_LOAD, 0, 0, 16 + 8 * rule.argument + 4 * rule.high), (_AND, 0, 0, rule.mask)]
        # behind the values stands the refusal; the next rule behind that
        for beyond, value in zip(range(count, 0, -1), rule.values, strict=True):
            found.append((_EQUAL, beyond - 1, beyond == 1, value) if rule.none_of else (_EQUAL, beyond, 0, value))
        found.append((_RETURN, 0, 0, _REFUSE | errno.EPERM))
    return [*found, (_RETURN, 0, 0, _ALLOW)]
