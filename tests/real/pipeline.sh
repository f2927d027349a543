# A loop into sed into a loop.
folder=$1
number=0
while [ ! -e "$folder/stop" ]; do
    echo "$number"
    number=$((number + 1))
    sleep 0.003
done | sed -u 's/^/line /' | {
    count=0
    while read -r line; do
        echo "$line"
        count=$((count + 1))
    done
    echo "end line $count"
} > "$folder/log"
