# Prepares a memory cgroup with a limit, and swap on zram with lz4; puts everything back when its input ends, which happens
# whatever becomes of the process at the other end. Arguments: the limit in bytes, the size of the swap in bytes, 0 for none.
# Answers one line: "ready FILE", where FILE takes the pid of who is to be limited, or "skip REASON".
trap '' INT TERM HUP
limit=$1 size=$2 zram=/sys/block/zram0 group='' swapping='' taken=''

restore() {
    if [ -n "$group" ]; then
        while read -r pid; do kill -KILL "$pid"; done <"$group/cgroup.procs"
        # Who is reclaiming for the kernel ends when that is done.
        for _ in {1..50}; do
            rmdir "$group" && break
            sleep 0.1
        done
    fi
    [ -z "$swapping" ] || swapoff /dev/zram0
    [ -z "$taken" ] || echo 1 >"$zram/reset"
} 2>/dev/null

skip() {
    echo "skip $*"
    restore
    exit
}

swap() {
    [ -e $zram ] || modprobe zram 2>/dev/null
    [ -e $zram ] || skip "this kernel has no zram"
    [ "$(cat $zram/disksize)" = 0 ] || skip "/dev/zram0 is in use"
    [ "$(wc -l </proc/swaps)" = 1 ] || skip "this machine swaps already, which would be measured instead"
    grep -q lz4 $zram/comp_algorithm || skip "this kernel's zram has no lz4"
    taken=1
    { echo lz4 >$zram/comp_algorithm && echo "$size" >$zram/disksize; } || skip "zram cannot be set up"
    mkswap /dev/zram0 >/dev/null 2>&1 || skip "mkswap failed"
    swapon -p 100 /dev/zram0 || skip "swapon failed"
    swapping=1
}

[ "$(id -u)" = 0 ] || skip "it takes root to limit memory and to swap"
[ "$size" = 0 ] || swap

if [ -e /sys/fs/cgroup/memory/memory.limit_in_bytes ]; then
    root=/sys/fs/cgroup/memory
    limits="memory.limit_in_bytes"
elif grep -qs memory /sys/fs/cgroup/cgroup.controllers; then
    root=/sys/fs/cgroup
    echo +memory >$root/cgroup.subtree_control || skip "the memory controller cannot be had"
    limits="memory.max"
else
    skip "there is no memory controller"
fi
mkdir "$root/pgmap-bench-$$" || skip "a cgroup cannot be made"
group=$root/pgmap-bench-$$
echo "$limit" >"$group/$limits" || skip "memory cannot be limited"

echo "ready $group/cgroup.procs"
read -r _
restore
