#!/bin/bash
# Several emulated hosts on one machine: network namespaces on a bridge, each behind a cable that is
# limited in both directions.
#
#   benchmarks/netlab.sh up HOSTS RATE     make them; RATE as tc writes it, such as 100mbit or 1gbit
#   benchmarks/netlab.sh run HOST COMMAND  run a command on host 0, 1, ...
#   benchmarks/netlab.sh down              remove them, and all that this script made
#
# Host i is 10.83.0.(i+1) with the interface eth0, and its name stands for that address there; this
# machine is 10.83.0.254. Only the rate is limited: no latency is added. Needs root and iproute2
# (`ip` and `tc`). `up` that fails or is broken off leaves nothing behind.
set -Eeuo pipefail

PREFIX=afnet
BRIDGE=afnet-bridge
NETWORK=10.83.0
FILES=/etc/netns  # where `ip netns exec` looks for a host's own /etc/hosts
refuse() {
    echo "netlab: $1" >&2
    exit 2
}

check_machine() {
    [ "$(id -u)" -eq 0 ] || refuse "making network namespaces needs root; next: sudo $0 ..."
    local tool
    for tool in ip tc; do
        command -v "$tool" > /dev/null ||
            refuse "$tool is not installed; next: install iproute2 (apt-get install iproute2)"
    done
}

hosts() {
    ip netns list | sed -n "s/^\($PREFIX[0-9]\+\).*/\1/p"
}

down() {
    local host cable
    for cable in $(ip -o link show type veth | sed -n "s/.*[ ]\($PREFIX-cable[0-9]\+\)@.*/\1/p"); do
        ip link delete "$cable"  # before its host, which would take it along some time later
    done
    for host in $(hosts); do
        ip netns delete "$host"
        rm -rf "${FILES:?}/$host"
    done
    if [ -d "$FILES" ]; then rmdir --ignore-fail-on-non-empty "$FILES"; fi
    ip link delete "$BRIDGE" 2> /dev/null || true
}

# Limits what an interface sends: limit RATE INTERFACE [HOST]. A timer of a busy machine comes late:
# `burst` lets up to 64 kB catch up, and `peakrate` only 5 % faster, so that after a pause small
# messages take their time too. The queue holds more than senders put on the way: nothing is dropped.
limit() {
    local rate=$1 interface=$2 host=${3:-} number=${1%%[a-z]*}
    local peak
    peak=$(awk "BEGIN { print $number * 1.05 }")${rate#"$number"}
    tc ${host:+-n "$host"} qdisc add dev "$interface" root \
        tbf rate "$rate" burst 64kb latency 800ms peakrate "$peak" minburst 4kb
}

add_host() {
    local host=$PREFIX$1 cable=$PREFIX-cable$1 rate=$2
    ip netns add "$host"
    ip link add "$cable" type veth peer name eth0 netns "$host"
    ip link set "$cable" master "$BRIDGE" up
    ip -n "$host" address add "$NETWORK.$(($1 + 1))/24" dev eth0
    ip -n "$host" link set lo up
    ip -n "$host" link set eth0 up
    limit "$rate" eth0 "$host"
    limit "$rate" "$cable"
    mkdir -p "$FILES/$host"
    printf '127.0.0.1 localhost\n%s %s\n' "$NETWORK.$(($1 + 1))" "$(uname -n)" > "$FILES/$host/hosts"
}

up() {
    local count=$1 rate=$2 number
    [[ "$count" =~ ^[1-9][0-9]{0,2}$ ]] && [ "$count" -le 200 ] ||
        refuse "HOSTS: received '$count'; allowed: a number from 1 to 200"
    [[ "$rate" =~ ^[0-9]+(\.[0-9]+)?[kmgt]?(bit|bps)$ && "$rate" == *[1-9]* ]] ||
        refuse "RATE: received '$rate'; allowed: a rate such as 100mbit"
    [ -z "$(hosts)" ] || refuse "there are hosts already; next: $0 down"
    trap 'trap - ERR; echo "netlab: could not be set up; what was made is removed" >&2; down; exit 1' \
        ERR INT TERM HUP
    ip link add "$BRIDGE" type bridge
    ip address add "$NETWORK.254/24" dev "$BRIDGE"
    ip link set "$BRIDGE" up
    for ((number = 0; number < count; number++)); do
        add_host "$number" "$rate"
    done
    trap - ERR INT TERM HUP
    echo "$count hosts at $rate: $NETWORK.1 to $NETWORK.$count; run on the first: $0 run 0 COMMAND"
}

case "${1:-}" in
up)
    [ $# -eq 3 ] || refuse "up takes HOSTS and RATE, for example: $0 up 4 100mbit"
    check_machine
    up "$2" "$3"
    ;;
run)
    [ $# -ge 3 ] || refuse "run takes a HOST and a COMMAND, for example: $0 run 0 hostname -I"
    [[ "$2" =~ ^(0|[1-9][0-9]{0,2})$ ]] || refuse "HOST: received '$2'; allowed: 0, 1, ..."
    check_machine
    ip netns pids "$PREFIX$2" > /dev/null 2>&1 ||
        refuse "there is no host $2; next: $0 up HOSTS RATE, which makes 0 to HOSTS - 1"
    exec ip netns exec "$PREFIX$2" "${@:3}"
    ;;
down)
    check_machine
    down
    ;;
*)
    sed -n '2,/^set /{/^#/s/^# \{0,1\}//p}' "$0"
    [ $# -eq 0 ] || exit 2
    ;;
esac
