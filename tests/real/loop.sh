# Commands at full speed, then with a pause each: a shell that uses vfork is in it most of the time.
folder=$1
number=0
while [ ! -e "$folder/stop" ]; do
    echo "true $number"
    /bin/true || exit 1
    echo "sleep $number"
    sleep 0.002 || exit 1
    number=$((number + 1))
done >> "$folder/log"
echo "end true $number
end sleep $number" >> "$folder/log"
