package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"log"
	"net"
	"os"
	"strconv"
	"strings"
	"sync"
	"time"

	"github.com/containerd/ttrpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/types/known/wrapperspb"
)

const service = "interop.Test"

// outcome is what a call came to; the same document as the other peers print.
type outcome struct {
	Case string `json:"case"`
	Code int    `json:"code"`
	Text string `json:"text"`
	Size int    `json:"size"`
}

func run(ctx context.Context, client *ttrpc.Client, name, service, method string, value []byte) outcome {
	var answer wrapperspb.BytesValue
	err := client.Call(ctx, service, method, &wrapperspb.BytesValue{Value: value}, &answer)
	if err == nil {
		if method == "Metadata" {
			return outcome{Case: name, Text: string(answer.Value)}
		}
		if string(answer.Value) != string(value) {
			return outcome{Case: name, Code: -1, Text: "another value came back", Size: len(answer.Value)}
		}
		return outcome{Case: name, Size: len(answer.Value)}
	}
	if errors.Is(err, context.DeadlineExceeded) {
		return outcome{Case: name, Code: int(codes.DeadlineExceeded)}
	}
	told := status.Convert(err)
	return outcome{Case: name, Code: int(told.Code()), Text: told.Message()}
}

func check(connection net.Conn) {
	client := ttrpc.NewClient(connection)
	out := json.NewEncoder(os.Stdout)
	tell := func(one outcome) {
		if err := out.Encode(one); err != nil {
			log.Fatal(err)
		}
	}
	background := context.Background()
	for _, size := range []int{0, 64, 64 << 10, 1 << 20, 4<<20 - 64} {
		tell(run(background, client, fmt.Sprintf("echo_%d", size), service, "Echo", make([]byte, size)))
	}
	for code := 1; code <= 16; code++ {
		name := fmt.Sprintf("fail_%d", code)
		tell(run(background, client, name, service, "Fail", []byte(fmt.Sprintf("%d text of %d", code, code))))
	}
	tell(run(background, client, "no_method", service, "Nope", nil))
	tell(run(background, client, "no_service", "interop.Nope", "Echo", nil))
	late, cancel := context.WithTimeout(background, 200*time.Millisecond)
	tell(run(late, client, "late", service, "Slow", nil))
	cancel()
	with := ttrpc.WithMetadata(background, ttrpc.MD{"trace": {"one", "two"}})
	tell(run(with, client, "metadata", service, "Metadata", nil))
	_, err := streamOnce(background, client)
	tell(outcome{Case: "stream", Code: int(status.Code(err))})
	var group sync.WaitGroup
	results := make([]outcome, 32)
	for number := range results {
		group.Add(1)
		go func() {
			defer group.Done()
			value := []byte(strings.Repeat(strconv.Itoa(number%10), 1000+number))
			results[number] = run(background, client, "at_once", service, "Echo", value)
		}()
	}
	group.Wait()
	sizes := 0
	for _, one := range results {
		if one.Code != 0 {
			tell(one)
		}
		sizes += one.Size
	}
	tell(outcome{Case: "at_once", Size: sizes})
}

// streamOnce opens a stream, which a server without streaming methods refuses.
func streamOnce(ctx context.Context, client *ttrpc.Client) (string, error) {
	desc := &ttrpc.StreamDesc{StreamingClient: true, StreamingServer: true}
	stream, err := client.NewStream(ctx, desc, service, "Stream", nil)
	if err != nil {
		return "", err
	}
	var answer wrapperspb.BytesValue
	if err := stream.RecvMsg(&answer); err != nil {
		return "", err
	}
	return string(answer.Value), nil
}

func serve(path string) {
	server, err := ttrpc.NewServer()
	if err != nil {
		log.Fatal(err)
	}
	method := func(work func(context.Context, []byte) ([]byte, error)) ttrpc.Method {
		return func(ctx context.Context, unmarshal func(interface{}) error) (interface{}, error) {
			var request wrapperspb.BytesValue
			if err := unmarshal(&request); err != nil {
				return nil, err
			}
			value, err := work(ctx, request.Value)
			return &wrapperspb.BytesValue{Value: value}, err
		}
	}
	server.Register(service, map[string]ttrpc.Method{
		"Echo": method(func(_ context.Context, value []byte) ([]byte, error) { return value, nil }),
		"Fail": method(func(_ context.Context, value []byte) ([]byte, error) {
			number, text, _ := strings.Cut(string(value), " ")
			code, err := strconv.Atoi(number)
			if err != nil {
				return nil, err
			}
			return nil, status.Error(codes.Code(code), text)
		}),
		"Slow": method(func(ctx context.Context, _ []byte) ([]byte, error) {
			<-ctx.Done()
			return nil, ctx.Err()
		}),
		"Metadata": method(func(ctx context.Context, _ []byte) ([]byte, error) {
			metadata, _ := ttrpc.GetMetadata(ctx)
			values, _ := metadata.Get("trace")
			return []byte(strings.Join(values, ",")), nil
		}),
	})
	listener, err := net.Listen("unix", path)
	if err != nil {
		log.Fatal(err)
	}
	fmt.Println("ready")
	log.Fatal(server.Serve(context.Background(), listener))
}
