# ruff: noqa: E501 - programs as they are, one an entry
"""Programs that try to get out of the sandbox, or to be paid for what they did not compute.

Each defines ``f(x)``. READ is a file with a secret, WRITE one that must not come into being, PORT a port that the host
listens on. The right result is a number that only the host knows. Programs named ``slow_…`` do not end by themselves.
"""

OS = """
    import sys
    os = sys.modules["os"]
"""

SUBCLASSES = """
    found = {}
    for kind in object.__subclasses__():
        try:
            found.update(kind.__init__.__globals__)
        except AttributeError:
            pass
"""

LIBC = """
    import sys
    ctypes = sys.modules["ctypes"]
    libc = ctypes.CDLL(None, use_errno=True)
"""

PROGRAMS = {
    # files
    "open_read": "def f(x):\n    return open('READ').read()",
    "open_write": "def f(x):\n    open('WRITE', 'w').write('x')\n    return 1",
    "open_append": "def f(x):\n    open('WRITE', 'a').close()\n    return 1",
    "open_stdlib": "import sys\ndef f(x):\n    return open(sys.modules['os'].__file__).read()[:100]",
    "io_open_code": "import io\ndef f(x):\n    return io.open_code('READ').read()",
    "os_open": f"def f(x):{OS}    return os.read(os.open('READ', os.O_RDONLY), 1000)",
    "os_listdir": f"def f(x):{OS}    return os.listdir('/')",
    "os_stat": f"def f(x):{OS}    return list(os.stat('READ'))",
    "os_mkdir": f"def f(x):{OS}    os.mkdir('WRITE')\n    return 1",
    "os_link": f"def f(x):{OS}    os.link('READ', 'WRITE')\n    return 1",
    "os_symlink": f"def f(x):{OS}    os.symlink('READ', 'WRITE')\n    return 1",
    "os_rename": f"def f(x):{OS}    os.rename('READ', 'WRITE')\n    return 1",
    "os_remove": f"def f(x):{OS}    os.remove('READ')\n    return 1",
    "os_chmod": f"def f(x):{OS}    os.chmod('READ', 0)\n    return 1",
    "os_truncate": f"def f(x):{OS}    os.truncate('READ', 0)\n    return 1",
    "os_mkfifo": f"def f(x):{OS}    os.mkfifo('WRITE')\n    return 1",
    "chroot_out": f"def f(x):{OS}    os.chroot('.')\n    os.chdir('../../../../..')\n    return os.listdir('.')",
    "memfd": f"def f(x):{OS}    return os.memfd_create('a')",
    "proc_environ": "def f(x):\n    return open('/proc/self/environ').read()",
    "proc_parent_memory": f"def f(x):{OS}    return open(f'/proc/{{os.getppid()}}/maps').read()[:200]",
    "import_by_path": "import sys\ndef f(x):\n    sys.path.insert(0, 'READ')\n    import secrets_module\n    return 1",
    "loader_read": "def f(x):\n    return __spec__.loader.get_data('READ')",
    "source_loader": (
        "import sys\ndef f(x):\n    external = sys.modules['_frozen_importlib_external']\n"
        "    return external.FileLoader('a', 'READ').get_data('READ')"
    ),
    "traceback_reads_source": ("def f(x):\n    exec(compile('raise ValueError(1)', 'READ', 'exec'))\n    return 1"),
    # the environment and other secrets
    "environ": f"def f(x):{OS}    return dict(os.environ)",
    "getenv_by_libc": (
        f"def f(x):{LIBC}    libc.getenv.restype = ctypes.c_char_p\n    return libc.getenv(b'HF_TOKEN')"
    ),
    "uname": f"def f(x):{OS}    return list(os.uname())",
    "argv": "import sys\ndef f(x):\n    return [sys.argv, sys.orig_argv, sys.path, sys.executable]",
    # introspection
    "subclasses_walk": f"def f(x):{SUBCLASSES}    return found['sys'].modules['os'].system('touch WRITE')",
    "subclasses_popen": f"def f(x):{SUBCLASSES}    return found['__builtins__']['open']('READ').read()",
    "frames_up": (
        "import sys\ndef f(x):\n    frame, names = sys._getframe(), []\n    while frame:\n"
        "        names += [repr(v)[:80] for v in frame.f_locals.values()]\n        frame = frame.f_back\n    return names"
    ),
    "frames_by_traceback": (
        "def f(x):\n    try:\n        1 / 0\n    except ZeroDivisionError as error:\n"
        "        frame = error.__traceback__.tb_frame\n    while frame.f_back:\n        frame = frame.f_back\n"
        "    return frame.f_globals['os'].listdir('/')"
    ),
    "generator_frame": (
        "def f(x):\n    def g():\n        yield g_.gi_frame.f_back.f_back.f_globals\n    g_ = g()\n"
        "    return sorted(next(g_))"
    ),
    "format_string": "def f(x):\n    return '{0.__class__.__init__.__globals__}'.format(print)",
    "format_answer": "def f(x):\n    return '{0.expected} {0.answer} {0.__dict__}'.format(x)",
    "gc_objects": (
        "import gc\ndef f(x):\n    return [repr(o)[:60] for o in gc.get_objects() if type(o) is dict][:200]"
    ),
    "rewrite_code": "def f(x):\n    f.__code__ = (lambda x: x).__code__\n    return f(x)",
    "reopen_builtins": "import sys\ndef f(x):\n    builtins = sys.modules['builtins']\n    builtins.open = lambda *a: 1\n    return builtins.open('READ')",
    "type_metaclass": "def f(x):\n    return type('A', (type,), {'mro': lambda s: [1]})('B', (), {})",
    # other values than plain ones
    "eq_always_true": "class A:\n    def __eq__(self, other):\n        return True\ndef f(x):\n    return A()",
    "eq_int": "class A(int):\n    def __eq__(self, other):\n        return True\n    __hash__ = int.__hash__\ndef f(x):\n    return A(1)",
    "eq_str": "class A(str):\n    def __eq__(self, other):\n        return True\n    __hash__ = str.__hash__\ndef f(x):\n    return A('')",
    "float_subclass": "class A(float):\n    def __sub__(self, other):\n        return 0.0\ndef f(x):\n    return A(1)",
    "list_subclass": "class A(list):\n    def __getitem__(self, i):\n        return 1\ndef f(x):\n    return [A([1])]",
    "reduce_gadget": (
        "class A:\n    def __reduce__(self):\n        return (__import__('os').system, ('touch WRITE',))\ndef f(x):\n    return A()"
    ),
    "claims_to_be_int": "class A:\n    __class__ = int\n    def __index__(self):\n        return 1\ndef f(x):\n    return A()",
    "returns_nan": "def f(x):\n    return float('nan')",
    "returns_function": "def f(x):\n    return f",
    "returns_itself": "def f(x):\n    a = []\n    a.append(a)\n    return a",
    "huge_int": "def f(x):\n    return 7 ** (7 ** 8)",
    "huge_int_text": "def f(x):\n    return str(10 ** 5000)",
    "huge_string": "def f(x):\n    return 'a' * (1 << 27)",
    "many_lists": "def f(x):\n    return [[] for _ in range(10 ** 6)]",
    "deep_lists": "def f(x):\n    a = []\n    for _ in range(10 ** 5):\n        a = [a]\n    return a",
    "colliding_keys": "def f(x):\n    return {i * (2 ** 61 - 1): 0 for i in range(30000)}",
    "surrogates": "def f(x):\n    print('\\ud800')\n    raise ValueError('\\udfff' * 50)",
    # errors
    "base_exception": "def f(x):\n    raise BaseException('out')",
    "system_exit": "def f(x):\n    raise SystemExit(0)",
    "keyboard_interrupt": "def f(x):\n    raise KeyboardInterrupt",
    "generator_exit": "def f(x):\n    raise GeneratorExit",
    "bad_str": ("class E(Exception):\n    def __str__(self):\n        raise SystemExit(0)\ndef f(x):\n    raise E()"),
    "long_message": "def f(x):\n    raise ValueError('a' * 10 ** 7)",
    "forged_type": "class TimeoutError(Exception):\n    pass\ndef f(x):\n    raise TimeoutError('not the builtin')",
    "exception_group": "def f(x):\n    raise BaseExceptionGroup('g', [SystemExit(0), ValueError(1)])",
    # ending or confusing the process
    "os_exit": f"def f(x):{OS}    os._exit(0)",
    "os_abort": f"def f(x):{OS}    os.abort()",
    "segfault": f"def f(x):{LIBC}    ctypes.string_at(8)",
    "kill_parent": f"def f(x):{OS}    os.kill(os.getppid(), 9)\n    return 1",
    "kill_all": f"def f(x):{OS}    os.kill(-1, 9)\n    return 1",
    "kill_group": f"def f(x):{OS}    os.killpg(0, 9)\n    return 1",
    "stop_itself": f"def f(x):{OS}    os.kill(os.getpid(), 19)\n    return 1",
    "recursion": "import sys\ndef f(x):\n    sys.setrecursionlimit(10 ** 9)\n    return f(x)",
    "deep_repr": "def f(x):\n    a = []\n    for _ in range(10 ** 6):\n        a = [a]\n    return repr(a)",
    "deep_parser": "def f(x):\n    return eval('(' * 10 ** 5 + ')' * 10 ** 5)",
    "bytecode": (
        "def f(x):\n    code = f.__code__.replace(co_code=bytes([100, 255] * 8), co_consts=())\n"
        "    return type(f)(code, {})()"
    ),
    # protocol
    "spoof_reply": (
        f'def f(x):{OS}    body = b\'{{"id":"0","value":1,"output":""}}\'\n'
        "    os.write(0, len(body).to_bytes(4, 'big') + body)\n    return 1"
    ),
    "spoof_garbage": f"def f(x):{OS}    os.write(0, b'\\xff' * 64)\n    return 1",
    "spoof_next": (
        f"def f(x):{OS}    real = os.write\n"
        "    def twice(d, v):\n        n = real(d, v)\n        real(d, v)\n        return n\n"
        "    os.write = twice\n    return 1"
    ),
    "spoof_by_frame": (
        "import sys\ndef f(x):\n    frame = sys._getframe(1)\n    n = frame.f_locals['number']\n    os = sys.modules['os']\n"
        '    body = (\'{"id":"%s","value":{"d":[{"i":"zz"},1]},"output":""}\' % n).encode()\n'
        "    os.write(0, len(body).to_bytes(4, 'big') + body)\n    return 1"
    ),
    "print_to_descriptors": (
        f"def f(x):{OS}    for d in range(1, 300):\n        try:\n            os.write(d, b'x')\n            return d\n"
        "        except OSError:\n            pass\n    return 'none'"
    ),
    "close_channel": f"def f(x):{OS}    os.close(0)\n    return 1",
    "dup_descriptor": f"def f(x):{OS}    return os.dup(0)",
    "print_flood": "def f(x):\n    for _ in range(3000):\n        print('a' * 1000)\n    return 1",
    "replace_stdout": "import sys\ndef f(x):\n    sys.stdout = None\n    print('x')\n    sys.__stdout__.write('y')\n    return 1",
    # network
    "connect": (
        "import sys\ndef f(x):\n    import _socket\n    s = _socket.socket()\n    s.connect(('127.0.0.1', PORT))\n"
        "    s.send(b'secret')\n    return 1"
    ),
    "listen": "def f(x):\n    import socket\n    s = socket.socket()\n    s.bind(('', 0))\n    return 1",
    "socket_by_libc": f"def f(x):{LIBC}    return libc.socket(2, 1, 0)",
    "socketpair": f"def f(x):{LIBC}    return libc.socketpair(1, 1, 0, ctypes.byref((ctypes.c_int * 2)()))",
    # processes and threads
    "fork": f"def f(x):{OS}    return os.fork()",
    "fork_bomb": f"def f(x):{OS}    while True:\n        os.fork()",
    "system": f"def f(x):{OS}    return os.system('touch WRITE')",
    "execve": f"def f(x):{OS}    os.execv('/bin/sh', ['sh', '-c', 'touch WRITE'])",
    "posix_spawn": f"def f(x):{OS}    return os.posix_spawn('/bin/sh', ['sh', '-c', 'touch WRITE'], {{}})",
    "thread": "import sys\ndef f(x):\n    _thread = sys.modules['_thread']\n    return _thread.start_new_thread(print, ())",
    "thread_bomb": "import sys\ndef f(x):\n    _thread = sys.modules['_thread']\n    while True:\n        _thread.start_new_thread(f, (x,))",
    "signal_handler": (
        "import sys\ndef f(x):\n    _signal = sys.modules['_signal']\n    _signal.signal(15, _signal.SIG_IGN)\n    return 1"
    ),
    "alarm": "import sys\ndef f(x):\n    _signal = sys.modules['_signal']\n    _signal.setitimer(0, 0.01)\n    return 1",
    "setuid": f"def f(x):{OS}    os.setuid(0)\n    return 1",
    "raise_limits": (
        "import sys\ndef f(x):\n    r = sys.modules['resource']\n    r.setrlimit(r.RLIMIT_AS, (-1, -1))\n    return 1"
    ),
    "ptrace_parent": f"def f(x):{LIBC}    return libc.ptrace(16, libc.getppid(), 0, 0)",
    "mount": f"def f(x):{LIBC}    return libc.mount(b'none', b'/', b'tmpfs', 0, None)",
    "unshare": f"def f(x):{LIBC}    return libc.unshare(0x10000000)",
    "process_vm_readv": f"def f(x):{LIBC}    return libc.process_vm_readv(libc.getppid(), None, 0, None, 0, 0)",
    "executable_memory": (
        f"def f(x):{LIBC}    libc.mmap.restype = ctypes.c_long\n    return libc.mmap(0, 4096, 7, 34, -1, 0)"
    ),
    "io_uring": f"def f(x):{LIBC}    return libc.syscall(425, 8, None)",
    "bpf": f"def f(x):{LIBC}    return libc.syscall(321, 0, None, 0)",
    "open_by_syscall": f"def f(x):{LIBC}    return libc.syscall(2, b'READ', 0)",
    "x32_syscall": f"def f(x):{LIBC}    return libc.syscall(0x40000002, b'READ', 0)",
    # memory and time
    "memory_list": "def f(x):\n    return len([0] * (1 << 33))",
    "memory_bomb": "def f(x):\n    a = [b'x' * (1 << 20)]\n    while True:\n        a.append(a[0] * 8)",
    "memory_string": "def f(x):\n    return len('a' * (1 << 36))",
    "slow_loop": "def f(x):\n    while True:\n        pass",
    "slow_loop_in_c": "def f(x):\n    return sum(range(10 ** 13))",
    "slow_swallow": "def f(x):\n    while True:\n        try:\n            while True:\n                pass\n        except BaseException:\n            pass",
    "slow_sleep": "import time\ndef f(x):\n    time.sleep(1000)\n    return 1",
    "slow_power": "def f(x):\n    return len(str(pow(3, 10 ** 9)))",
    "slow_regex": "import re\ndef f(x):\n    return bool(re.match('(a+)+$', 'a' * 60 + 'b'))",
    "slow_read": f"def f(x):{OS}    return os.read(0, 100)",
    "slow_del": (
        "class A:\n    def __del__(self):\n        while True:\n            pass\ndef f(x):\n    a = A()\n    del a\n    return 1"
    ),
    "slow_print": "def f(x):\n    while True:\n        print('a' * 100000)",
    "slow_definition": "def f(x, y=sum(range(10 ** 13))):\n    return 1",
    "slow_write_flood": f"def f(x):{OS}    while True:\n        os.write(0, b'\\0' * 65536)",
    # remembering
    "remember": "def f(x, seen=[]):\n    seen.append(x)\n    return len(seen)",
    "patch_everything": (
        "import sys\ndef f(x):\n    builtins = sys.modules['builtins']\n    for name in dir(builtins):\n        if name[0].islower():\n"
        "            setattr(builtins, name, lambda *a, **k: 1)\n    return 1"
    ),
    # numbers of calls that no wrapper of Python's leads to, and hooks into what runs around the function
    "signals_by_syscall": f"def f(x):{LIBC}    return [libc.syscall(n, libc.getppid(), 9, 9) for n in (62, 129, 200, 234, 424)]",
    "system_v": f"def f(x):{LIBC}    return [libc.syscall(n, 77, 4096, 0o1600) for n in (29, 64, 68)]",
    "watchers": f"def f(x):{LIBC}    return [libc.syscall(n, 0, 0, 0, 8) for n in (253, 282, 283, 284, 291, 298, 300, 323)]",
    "channel_owner": f"def f(x):{LIBC}    return [libc.fcntl(0, 8, libc.getppid()), libc.fcntl(0, 10, 9), libc.fcntl(0, 4, 0o20002)]",
    "ioctl_owner": f"def f(x):{LIBC}    return libc.ioctl(0, 0x8901, ctypes.byref(ctypes.c_int(libc.getppid())))",
    "limits_of_parent": f"def f(x):{LIBC}    return libc.syscall(302, libc.getppid(), 7, (ctypes.c_uint64 * 2)(), None)",
    "shutdown_channel": f"def f(x):{LIBC}    return [libc.shutdown(0, 0), libc.shutdown(0, 2)]",
    "slow_futex": f"def f(x):{LIBC}    libc.syscall(202, ctypes.byref(ctypes.c_int(5)), 0, 5, None, None, 0)\n    return 1",
    "spoof_empty": f"def f(x):{OS}    os.write(0, bytes(4))\n    return 1",
    "spoof_length": f"def f(x):{OS}    os.write(0, bytes([255] * 4) + b'a' * 100)\n    return 1",
    "spoof_nesting": f"def f(x):{OS}    m = b'[' * 60000 + b']' * 60000\n    os.write(0, len(m).to_bytes(4, 'big') + m)\n    return 1",
    "spoof_infinity": f'def f(x):{OS}    m = b\'{{"id": 1e999, "output": "", "value": NaN}}\'\n    os.write(0, len(m).to_bytes(4, \'big\') + m)\n    return 1',
    "audit_hook": "import sys\ndef f(x):\n    def hook(*args):\n        raise KeyboardInterrupt\n    sys.addaudithook(hook)\n    return 1",
    "trace_caller": "import sys\ndef f(x):\n    def trace(frame, event, arg):\n        frame.f_trace = trace\n        return trace\n    sys._getframe(1).f_trace = trace\n    sys.settrace(trace)\n    return 1",
    "import_hook": "import sys\nclass Hook:\n    def find_spec(self, name, path=None, target=None):\n        open('WRITE', 'w').write(name)\ndef f(x):\n    sys.meta_path.insert(0, Hook())\n    import xmlrpc\n    return 1",
    "terminal": "def f(x):\n    print('\\x1b]0;own\\x07\\x1b[2J\\x9b31m\\rpassed')\n    raise ValueError('\\x1b[2Jpassed\\x00')",
    # what moves descriptors, names files and processes in newer ways, and belongs to the whole machine
    "send_descriptor": f"def f(x):{LIBC}    return [libc.syscall(n, 0, (ctypes.c_uint64 * 32)(), 0) for n in (46, 47, 44, 45, 54, 53)]",
    "descriptor_of_parent": f"def f(x):{LIBC}    p = libc.getppid()\n    return [libc.syscall(434, p, 0), libc.syscall(438, 3, 0, 0), libc.syscall(312, p, p, 0, 0, 0), libc.syscall(440, 3, None, 0, 21, 0)]",
    "open_in_newer_ways": f"def f(x):{LIBC}    r = b'READ'\n    how = (ctypes.c_uint64 * 3)()\n    return [libc.syscall(437, -100, r, how, 24), libc.syscall(257, -100, r, 0), libc.syscall(85, b'WRITE', 0o600), libc.syscall(303, -100, r, how, how, 0), libc.syscall(428, -100, r, 0), libc.syscall(332, -100, r, 0, 2047, (ctypes.c_char * 256)())]",
    "schedule_of_parent": f"def f(x):{LIBC}    p = libc.getppid()\n    return [libc.syscall(203, p, 8, ctypes.byref(ctypes.c_uint64(1))), libc.syscall(141, 0, p, 19), libc.syscall(251, 1, p, 7), libc.syscall(144, p, 5, ctypes.byref(ctypes.c_int(0)))]",
    "keyrings": f"def f(x):{LIBC}    return [libc.syscall(248, b'user', b'a', b'b', 1, -3), libc.syscall(249, b'user', b'a', None, -3), libc.syscall(250, 0, -3, 1)]",
    "clocks_of_the_machine": f"def f(x):{LIBC}    t = (ctypes.c_uint64 * 32)()\n    return [libc.syscall(n, 0, t, t) for n in (227, 164, 159, 305)]",
    "whole_machine": f"def f(x):{LIBC}    return [libc.syscall(n, 0, 0, 0, 0) for n in (103, 163, 167, 170, 175, 246, 313, 320, 321)]",
    "other_forks": f"def f(x):{LIBC}    return [libc.syscall(58), libc.syscall(56, 17, 0, 0, 0, 0), libc.syscall(435, (ctypes.c_uint64 * 11)(), 88)]",
    "own_filter": f"def f(x):{LIBC}    return [libc.syscall(317, 1, 0, None), libc.prctl(22, 1, 0, 0, 0), libc.prctl(4, 1, 0, 0, 0), libc.syscall(135, 0x0400000), libc.syscall(154, 0, None, 0)]",
    "splices": f"def f(x):{LIBC}    v = (ctypes.c_uint64 * 2)()\n    return [libc.syscall(n, 0, v, 0, v, 1, 0) for n in (275, 276, 278, 40, 326, 19, 20, 17, 18)]",
    "memory_by_break": f"def f(x):{LIBC}    libc.sbrk.restype = ctypes.c_long\n    libc.mremap.restype = ctypes.c_long\n    return [libc.sbrk(ctypes.c_long(1 << 40)), libc.mlockall(7), libc.mremap(0, 0, ctypes.c_size_t(1 << 40), 1)]",
    "code_made_executable": f"def f(x):{LIBC}    a = id(f) // 4096 * 4096\n    return [libc.mprotect(ctypes.c_void_p(a), 4096, 5), libc.syscall(329, ctypes.c_void_p(a), 4096, 7, -1)]",
    # memory that belongs to the interpreter
    "other_small_integers": f"def f(x):{LIBC}    ctypes.c_uint32.from_address(id(7) + 24).value = 9\n    return 7",
    "freed_twice": f"def f(x):{LIBC}    libc.malloc.restype = ctypes.c_void_p\n    p = ctypes.c_void_p(libc.malloc(64))\n    libc.free(p)\n    libc.free(p)\n    libc.free(ctypes.c_void_p(id(x)))\n    return 1",
    "deep_iterator": "import itertools\ndef f(x):\n    it = iter([1])\n    for _ in range(10 ** 6):\n        it = itertools.chain(it)\n    return next(it)",
    "slow_doubled_list": "def f(x):\n    a = [1]\n    for _ in range(50):\n        a = [a, a]\n    return a",
    # what is called around the function, or after it
    "written_after_the_answer": (
        f"def f(x):{OS}    def hook(frame, event, arg):\n        if event == 'c_return' and arg is os.write:\n            sys.setprofile(None)\n            os.write(0, bytes(4))\n"
        "    sys.setprofile(hook)\n    return 1"
    ),
    "builtin_by_its_spec": (
        "import sys\ndef f(x):\n    imp = sys.modules['_imp']\n    spec = type(sys.__spec__)('faulthandler', None, origin='built-in')\n    module = imp.create_builtin(spec)\n"
        "    imp.exec_builtin(module)\n    module.dump_traceback(0)\n    return 1"
    ),
    "slow_trickle": f"import time\ndef f(x):{OS}    os.write(0, b'\\0\\0\\xff\\xff')\n    while True:\n        os.write(0, b' ')\n        time.sleep(0.01)",
    "raises_stop_iteration": "def f(x):\n    raise StopIteration(7)",
    "is_a_class": "class f:\n    def __new__(cls, x):\n        return 1",
    "is_asynchronous": "async def f(x):\n    return 1",
}

# an encoder of its own in the place of the sandbox's: expressions of texts that stand for no plain value, or for a strange one
TEXTS = {
    "list_as_key": """'{"d":[[],1]}'""",
    "list_in_a_key": """'{"s":[{"t":[[]]}]}'""",
    "long_float": "'1' * 900_000 + '.5'",
    "odd_hexadecimal": """'{"i":"-0x_1"}'""",
    "wide_bytes": """'{"b":"\\\\u0100"}'""",
    "no_tag": "'{}'",
}
# whole answers: another printed text, a failure of the sandbox that would not be scored, two values
ANSWERS = {
    "list_as_output": '"value":1,"output":[1]',
    "failure_of_the_sandbox": '"output":"","error":["SandboxUnavailableError","no"]',
    "error_without_text": '"output":"","error":["ValueError"]',
    "two_values": '"output":"","value":1,"value":2',
}
PROGRAMS |= {
    f"encodes_{name}": f"import sys\ndef f(x):\n    sys.modules['codec'].encode = lambda *a, **k: {text}\n    return 1"
    for name, text in TEXTS.items()
}
PROGRAMS |= {
    f"answers_{name}": f"def f(x):{OS}    m = b'{{\"id\":\"' + sys._getframe(1).f_locals['number'].encode() + {(chr(34) + ',' + rest + '}').encode()!r}\n    os.write(0, len(m).to_bytes(4, 'big') + m)\n    return 1"
    for name, rest in ANSWERS.items()
}
