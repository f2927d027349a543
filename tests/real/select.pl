# A child writes numbers to a pipe; the parent waits for them with select, with a timeout.
use strict;
use warnings;
use IO::Handle;

my $folder = shift;
pipe(my $read, my $write) or die "pipe: $!";
my $child = fork() // die "fork: $!";
if ($child == 0) {
    close $read;
    $write->autoflush(1);
    my $number = 0;
    until (-e "$folder/stop") {
        print $write "$number\n";
        $number++;
        select undef, undef, undef, 0.003;
    }
    print $write "end $number\n";
    exit 0;
}
close $write;
open my $log, '>', "$folder/log" or die "log: $!";
$log->autoflush(1);
my ($buffer, $waits) = ('', 0);
while (1) {
    my $set = '';
    vec($set, fileno($read), 1) = 1;
    my $ready = select($set, undef, undef, 0.001);
    die "select: $!" if $ready < 0;
    print $log "wait $waits\n";
    $waits++;
    next unless $ready;
    sysread($read, $buffer, 4096, length $buffer) or last;
    while ($buffer =~ s/^(.*)\n//) {
        my $line = $1;
        print $log $line =~ /^end (\d+)$/ ? "end number $1\n" : "number $line\n";
    }
}
print $log "end wait $waits\n";
waitpid($child, 0) == $child && $? == 0 or die "child: $?";
