package main

import (
	"bufio"
	"context"
	"fmt"
	"log"
	"net"
	"os"
	"strings"
	"sync"
	"syscall"
	"time"

	"github.com/containerd/ttrpc"
	"google.golang.org/protobuf/types/known/wrapperspb"
)

func call(client *ttrpc.Client, request *wrapperspb.BytesValue) {
	var answer wrapperspb.BytesValue
	if err := client.Call(context.Background(), "s", "m", request, &answer); err != nil {
		log.Fatal(err)
	}
	if len(answer.Value) != len(request.Value) {
		log.Fatalf("%d bytes came back of %d", len(answer.Value), len(request.Value))
	}
}

func calls(client *ttrpc.Client, request *wrapperspb.BytesValue, window int) {
	if window == 1 {
		call(client, request)
		return
	}
	var group sync.WaitGroup
	for range window {
		group.Add(1)
		go func() {
			defer group.Done()
			call(client, request)
		}()
	}
	group.Wait()
}

func cpuNanos() int64 {
	var usage syscall.Rusage
	if err := syscall.Getrusage(syscall.RUSAGE_SELF, &usage); err != nil {
		log.Fatal(err)
	}
	return usage.Utime.Nano() + usage.Stime.Nano()
}

// bench answers each line "run N SIZE WINDOW" on standard input by one line: processor nanoseconds of this process, then N
// times in nanoseconds, each a window's time by its size.
func bench(connection net.Conn) {
	client := ttrpc.NewClient(connection)
	fmt.Println("ready")
	lines := bufio.NewScanner(os.Stdin)
	for lines.Scan() {
		var count, size, window int
		if _, err := fmt.Sscanf(lines.Text(), "run %d %d %d", &count, &size, &window); err != nil {
			log.Fatal(err)
		}
		request := &wrapperspb.BytesValue{Value: make([]byte, size)}
		before := cpuNanos()
		times := make([]string, 0, count)
		for range count {
			started := time.Now()
			calls(client, request, window)
			times = append(times, fmt.Sprint(time.Since(started).Nanoseconds()/int64(window)))
		}
		fmt.Println(cpuNanos()-before, strings.Join(times, " "))
	}
}
