package edge_test

import (
	"context"
	"crypto/tls"
	"errors"
	"io"
	"net"
	"strconv"
	"strings"
	"testing"

	"github.com/stretchr/testify/require"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials"
	"google.golang.org/grpc/health"
	healthpb "google.golang.org/grpc/health/grpc_health_v1"
	"google.golang.org/grpc/metadata"
	"google.golang.org/grpc/peer"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/types/known/wrapperspb"
)

// grpcAPI is a gRPC server: the stock health service, and a method that answers
// each message as it comes.
type grpcAPI struct {
	health *health.Server
	seen   chan metadata.MD
}

// echoMethod streams both ways.
const echoMethod = "/edge.Echo/Talk"

func startGRPC(t *testing.T, creds credentials.TransportCredentials) (a *grpcAPI, addr string) {
	t.Helper()
	a = &grpcAPI{health.NewServer(), make(chan metadata.MD, 100)}
	server := grpc.NewServer(grpc.Creds(creds), grpc.UnaryInterceptor(
		func(ctx context.Context, req any, _ *grpc.UnaryServerInfo, handler grpc.UnaryHandler) (any, error) {
			md, _ := metadata.FromIncomingContext(ctx)
			a.seen <- md
			err := errors.Join(grpc.SetHeader(ctx, metadata.Pairs("x-head", "1")),
				grpc.SetTrailer(ctx, metadata.Pairs("x-tail", "2", "x-tail-bin", "\x00\xff")))
			if err != nil {
				return nil, err
			}
			return handler(ctx, req)
		}))
	healthpb.RegisterHealthServer(server, a.health)
	server.RegisterService(&grpc.ServiceDesc{
		ServiceName: "edge.Echo", HandlerType: (*any)(nil),
		Streams: []grpc.StreamDesc{{StreamName: "Talk", ServerStreams: true, ClientStreams: true, Handler: talk}},
	}, a)
	l, err := net.Listen("tcp", "127.0.0.1:0")
	require.NoError(t, err)
	ended := make(chan error, 1)
	go func() { ended <- server.Serve(l) }()
	t.Cleanup(func() {
		server.Stop()
		require.NoError(t, <-ended)
	})
	return a, l.Addr().String()
}

func talk(_ any, stream grpc.ServerStream) error {
	n := 0
	for ; ; n++ {
		var m wrapperspb.StringValue
		if err := stream.RecvMsg(&m); errors.Is(err, io.EOF) {
			break
		} else if err != nil {
			return err
		}
		m.Value = strings.ToUpper(m.Value)
		if err := stream.SendMsg(&m); err != nil {
			return err
		}
	}
	stream.SetTrailer(metadata.Pairs("x-count", strconv.Itoa(n)))
	return nil
}

// dialGRPC connects to the ingress.
func dialGRPC(t *testing.T, p *pki, addr string) *grpc.ClientConn {
	t.Helper()
	conn, err := grpc.NewClient("passthrough:///"+addr, grpc.WithTransportCredentials(credentials.NewTLS(p.config())))
	require.NoError(t, err)
	t.Cleanup(func() { require.NoError(t, conn.Close()) })
	return conn
}

// TestGRPC calls a gRPC API through an ingress that does not capture, or not what
// gRPC uses.
func TestGRPC(t *testing.T) {
	t.Parallel()
	p := newPKI(t)
	upstreamTLS := credentials.NewTLS(&tls.Config{Certificates: []tls.Certificate{p.serverCert()}})
	for _, c := range []struct {
		name     string
		scheme   string
		creds    credentials.TransportCredentials
		settings []string
	}{
		{"capture off, the API without TLS", "http://", nil, []string{"CAPTURE=off"}},
		{"POST not captured, the API with TLS", "https://", upstreamTLS, []string{"CAPTURE_METHODS=PUT", "UPSTREAM_CA_FILE=" + p.caFile(), "PRESERVE_HOST=false"}},
	} {
		t.Run(c.name, func(t *testing.T) {
			t.Parallel()
			api, addr := startGRPC(t, c.creds)
			s := startTLS(t, p, c.scheme+addr, c.settings...)
			conn := dialGRPC(t, p, ingressAddr(s))
			client := healthpb.NewHealthClient(conn)
			ctx, cancel := context.WithTimeout(t.Context(), patience)
			defer cancel()

			t.Run("a call, with its metadata", func(t *testing.T) {
				var head, tail metadata.MD
				var from peer.Peer
				out := metadata.AppendToOutgoingContext(ctx, "x-own", "a", "x-own", "b", "x-own-bin", "\x01\x00", "x-request-uuid", "forged")
				resp, err := client.Check(out, &healthpb.HealthCheckRequest{}, grpc.Header(&head), grpc.Trailer(&tail), grpc.Peer(&from))
				require.NoError(t, err)
				require.Equal(t, healthpb.HealthCheckResponse_SERVING, resp.Status)
				require.Equal(t, []string{"1"}, head["x-head"])
				require.Equal(t, []string{"2"}, tail["x-tail"])
				require.Equal(t, []string{"\x00\xff"}, tail["x-tail-bin"])
				require.Len(t, head["x-request-uuid"], 1)
				require.NotContains(t, head, "x-request-stored")
				got := receive(t, api.seen)
				require.Equal(t, []string{"a", "b"}, got["x-own"])
				require.Equal(t, []string{"\x01\x00"}, got["x-own-bin"])
				require.Equal(t, head["x-request-uuid"], got["x-request-uuid"])
				require.Equal(t, []string{"127.0.0.1"}, got["x-forwarded-for"])
				require.Equal(t, []string{"https"}, got["x-forwarded-proto"])
				require.Equal(t, []string{"2.0 holdfast"}, got["via"])
			})
			t.Run("an error", func(t *testing.T) {
				var tail metadata.MD
				_, err := client.Check(ctx, &healthpb.HealthCheckRequest{Service: "unknown"}, grpc.Trailer(&tail))
				require.Equal(t, codes.NotFound, status.Code(err))
				require.Equal(t, "unknown service", status.Convert(err).Message())
				require.Equal(t, []string{"2"}, tail["x-tail"])
				err = conn.Invoke(ctx, "/edge.Echo/Nothing", &wrapperspb.StringValue{}, &wrapperspb.StringValue{})
				require.Equal(t, codes.Unimplemented, status.Code(err))
			})
			t.Run("a stream of the server's", func(t *testing.T) {
				streamCtx, stop := context.WithCancel(ctx)
				defer stop()
				stream, err := client.Watch(streamCtx, &healthpb.HealthCheckRequest{})
				require.NoError(t, err)
				// Each comes before the next is sent.
				for _, state := range []healthpb.HealthCheckResponse_ServingStatus{
					healthpb.HealthCheckResponse_SERVING, healthpb.HealthCheckResponse_NOT_SERVING, healthpb.HealthCheckResponse_SERVING,
				} {
					api.health.SetServingStatus("", state)
					resp, err := stream.Recv()
					require.NoError(t, err)
					require.Equal(t, state, resp.Status)
				}
				stop()
				_, err = stream.Recv()
				require.Equal(t, codes.Canceled, status.Code(err))
			})
			t.Run("a stream both ways", func(t *testing.T) {
				stream, err := conn.NewStream(ctx, &grpc.StreamDesc{ServerStreams: true, ClientStreams: true}, echoMethod)
				require.NoError(t, err)
				for _, text := range []string{"one", "two", strings.Repeat("large", 200_000)} {
					require.NoError(t, stream.SendMsg(wrapperspb.String(text)))
					var m wrapperspb.StringValue
					require.NoError(t, stream.RecvMsg(&m))
					require.True(t, m.Value == strings.ToUpper(text))
				}
				require.NoError(t, stream.CloseSend())
				require.ErrorIs(t, stream.RecvMsg(&wrapperspb.StringValue{}), io.EOF)
				require.Equal(t, []string{"3"}, stream.Trailer()["x-count"])
			})
		})
	}
}

// TestGRPCCaptured tells a client why its calls cannot be stored.
func TestGRPCCaptured(t *testing.T) {
	t.Parallel()
	p := newPKI(t)
	api, addr := startGRPC(t, nil)
	conn := dialGRPC(t, p, ingressAddr(startTLS(t, p, "http://"+addr)))
	ctx, cancel := context.WithTimeout(t.Context(), patience)
	defer cancel()
	_, err := healthpb.NewHealthClient(conn).Check(ctx, &healthpb.HealthCheckRequest{})
	require.ErrorContains(t, err, "415 (Unsupported Media Type)")
	require.Empty(t, api.seen)
}

// TestGRPCWithoutAPI ends a call to an API that is not there with an error that
// says so.
func TestGRPCWithoutAPI(t *testing.T) {
	t.Parallel()
	p := newPKI(t)
	l, err := net.Listen("tcp", "127.0.0.1:0")
	require.NoError(t, err)
	conn := dialGRPC(t, p, ingressAddr(startTLS(t, p, "http://"+l.Addr().String(), "CAPTURE=off")))
	require.NoError(t, l.Close())
	ctx, cancel := context.WithTimeout(t.Context(), patience)
	defer cancel()
	_, err = healthpb.NewHealthClient(conn).Check(ctx, &healthpb.HealthCheckRequest{})
	require.Equal(t, codes.Unavailable, status.Code(err))
	require.ErrorContains(t, err, "502")
}
