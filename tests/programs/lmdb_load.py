"""A load on LMDB that can be checked at any time: what each transaction does follows from its number.

    lmdb_load.py load DIRECTORY TRANSACTIONS [writemap]    goes on where the database ends, and tells of each commit
    lmdb_load.py verify DIRECTORY                          reads everything, and compares it with what should be there

Loading says on standard error how much of the database was in RAM after each commit, and once nothing is done any more, in MiB.
"""
import array, hashlib, random, sys, time
import lmdb

KEYS = 150_000
PER_TRANSACTION = 4_000
MAP_BYTES = 512 << 20
VERSION = b'version'

def changes(number):
    """The keys that a transaction writes, and those that it deletes then."""
    choose = random.Random(number)
    keys = [choose.randrange(KEYS) for _ in range(PER_TRANSACTION)]
    return keys[: PER_TRANSACTION * 9 // 10], keys[PER_TRANSACTION * 9 // 10 :]

def name(key):
    return b'%08d' % key

def value(key, number):
    digest = hashlib.blake2b(b'%d %d' % (key, number), digest_size=32).digest()
    return digest * (24 + digest[0] % 64)

def expected(version):
    """After so many transactions: which wrote each key last, or 0."""
    last = array.array('H', bytes(2 * KEYS))
    for number in range(1, version + 1):
        written, deleted = changes(number)
        for key in written: last[key] = number
        for key in deleted: last[key] = 0
    return last

def resident():
    """MiB of the database in this process's RAM."""
    mine, total = False, 0
    for line in open('/proc/self/smaps'):
        word = line.split()[0]
        if '-' in word and not word.endswith(':'): mine = line.rstrip().endswith('/data.mdb')
        elif mine and word == 'Rss:': total += int(line.split()[1])
    return total >> 10

def load(base, transactions):
    with base.begin() as view:
        start = int(view.get(VERSION, b'0'))
    samples = []
    for number in range(start + 1, start + 1 + transactions):
        written, deleted = changes(number)
        with base.begin(write=True) as change:
            for key in written: change.put(name(key), value(key, number))
            for key in deleted: change.delete(name(key))
            change.put(VERSION, b'%d' % number)
        print(number, flush=True)
        samples.append(resident())
    for _ in range(60):
        left = resident()
        if left <= 32: break
        time.sleep(0.05)
    print(*samples, left, file=sys.stderr)

def verify(base):
    digest = hashlib.sha256()
    with base.begin() as view:
        version = int(view.get(VERSION))
        last = expected(version)
        # In no order first, so that most of it comes from the disk.
        choose = random.Random(version)
        for _ in range(10_000):
            key = choose.randrange(KEYS)
            digest.update(view.get(name(key), b''))
        for key, got in view.cursor():
            if key != VERSION:
                number = last[int(key)]
                assert number and got == value(int(key), number), key
                last[int(key)] = 0
            digest.update(key + got)
        assert not any(last), 'keys are missing'
    print(version, digest.hexdigest())

what, directory, *rest = sys.argv[1:]
base = lmdb.open(directory, map_size=MAP_BYTES, writemap='writemap' in rest, map_async=False)
verify(base) if what == 'verify' else load(base, int(rest[0]))
base.close()
